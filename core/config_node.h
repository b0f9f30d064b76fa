#pragma once
#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/error.h"

namespace krait {
inline namespace core {

/// Where a value was written: "exp.yaml:22:3", or "override 'train.steps=5'" for the command line.
struct SourceMark {
  std::shared_ptr<const std::string> source;
  int line = 0, column = 0;  // from 1; 0 when the source has no lines
  std::string str() const;
};

/// A tree of settings as the user wrote it: maps, lists and scalars, each with its path and place.
/// Scalars stay text until somebody who knows the type reads them (core/option_reader.h).
/// A value: copies are deep.
class ConfigNode {
 public:
  enum class Kind : uint8_t { null, scalar, list, map };
  using Entry = std::pair<std::string, ConfigNode>;

  ConfigNode() = default;  // null
  static ConfigNode map() { return ConfigNode(Kind::map); }
  static ConfigNode list() { return ConfigNode(Kind::list); }
  /// `quoted` text is a string even where it looks like a number.
  static ConfigNode scalar(std::string text, bool quoted = false);
  static ConfigNode of(bool value) { return scalar(value ? "true" : "false"); }
  static ConfigNode of(int64_t value) { return scalar(fmt::format("{}", value)); }
  static ConfigNode of(double value) { return scalar(fmt::format("{}", value)); }  // shortest that reads the same
  static ConfigNode of(const std::string& value);                                  // quoted where it must be

  Kind kind() const { return kind_; }
  bool is_null() const { return kind_ == Kind::null; }
  bool is_scalar() const { return kind_ == Kind::scalar; }
  bool is_list() const { return kind_ == Kind::list; }
  bool is_map() const { return kind_ == Kind::map; }
  /// Scalars.
  const std::string& text() const { return text_; }
  bool quoted() const { return quoted_; }
  /// Lists.
  const std::vector<ConfigNode>& items() const { return items_; }
  std::vector<ConfigNode>& items() { return items_; }
  ConfigNode& append(ConfigNode item);
  /// Maps, in the order of the file. A list: references to values survive insertion and sorting.
  const std::list<Entry>& entries() const { return entries_; }
  std::list<Entry>& entries() { return entries_; }
  const ConfigNode* find(std::string_view key) const;
  ConfigNode* find(std::string_view key);
  /// Replaces or appends. The value keeps its own mark and gets this node's path.
  ConfigNode& set(const std::string& key, ConfigNode value);

  /// "model.attention.n_heads", "model.layers[1]"; empty at the root.
  const std::string& path() const { return path_; }
  void set_path(std::string path);  // and the paths of everything below
  /// Of the key for a map's value, of the value for a list's item.
  const SourceMark& mark() const { return mark_; }
  void set_mark(SourceMark mark) { mark_ = std::move(mark); }
  /// A value nobody wrote: filled in by a reader from its defaults.
  bool is_default() const { return is_default_; }
  void set_default(bool is_default) { is_default_ = is_default; }

  /// Lays `other` over this node: maps are merged key by key, everything else is replaced.
  void merge(const ConfigNode& other);

  /// A scalar's text fit for one line of a message: cut when long, without control characters.
  std::string shown() const;
  /// "5", "string 'abc'", "a list": what was found, for messages.
  std::string describe() const;
  /// Throws ConfigError "place: path: message", with "try suggestion" on a second line.
  [[noreturn]] void fail(const std::string& message, const std::string& suggestion = "") const;

 private:
  explicit ConfigNode(Kind kind) : kind_(kind) {}
  Kind kind_ = Kind::null;
  bool quoted_ = false, is_default_ = false;
  std::string text_, path_;
  SourceMark mark_;
  std::vector<ConfigNode> items_;
  std::list<Entry> entries_;
};

/// True for null, booleans and numbers: plain text that YAML does not read as a string.
bool is_plain_non_string(std::string_view text);

/// The candidate with the smallest edit distance, if it is near enough to be a misspelling; else empty.
std::string nearest_name(std::string_view name, const std::vector<std::string>& candidates);

}  // namespace core
}  // namespace krait

#pragma once
#include <array>
#include <limits>
#include <optional>

#include "core/config_node.h"

namespace krait {
inline namespace core {

/// The values an option may take.
struct Range {
  double min = -std::numeric_limits<double>::infinity();
  double max = std::numeric_limits<double>::infinity();
  bool open_min = false, open_max = false;  // the limit itself is refused
  bool contains(double value) const;
  std::string str() const;  // " >= 1", " in [0, 1)", ""
};
inline Range at_least(double min) { return {.min = min}; }
inline Range above(double min) { return {.min = min, .open_min = true}; }
inline Range between(double min, double max) { return {.min = min, .max = max}; }
inline Range below_one() { return {.min = 0, .max = 1, .open_max = true}; }  // a probability to drop

/// Reads the options of one map of a config. Each read names an option whose variable holds the default, takes
/// the user's value where there is one, and writes what holds into the node, so that the tree ends complete.
/// Every message says where, what was found and what was expected. After the last read call finish().
///   OptionReader options(node);
///   options.read("n_heads", config.n_heads, at_least(1));
///   options.choice("type", config.type, {"gelu", "swiglu"});
///   if (d_model % config.n_heads) options.fail("n_heads", fmt::format("{} does not divide ...", ...), "4 or 8");
///   options.finish();
class OptionReader {
 public:
  /// `section` is a map, or null for all defaults; it must outlive the reader.
  explicit OptionReader(ConfigNode& section);

  void read(const std::string& name, bool& value);
  void read(const std::string& name, int64_t& value, const Range& range = {});
  void read(const std::string& name, double& value, const Range& range = {});
  void read(const std::string& name, std::string& value);
  void read(const std::string& name, std::array<double, 2>& value, const Range& range = {});
  /// A list of names; a single name counts as a list of one.
  void read(const std::string& name, std::vector<std::string>& value);
  void choice(const std::string& name, std::string& value, const std::vector<std::string>& choices);
  /// Like choice, but `true` and `false` mean the given names ("recompute: false").
  void choice(const std::string& name, std::string& value, const std::vector<std::string>& choices,
              const std::string& if_false, const std::string& if_true);

  /// A map of its own (made empty when absent) for another reader.
  ConfigNode& section(const std::string& name);
  /// The same, only where the user wrote it.
  ConfigNode* find_section(const std::string& name);

  /// Whether the user wrote it, as against a default filled in.
  bool given(const std::string& name) const;
  void require(const std::string& name);
  /// Writes a derived value into the tree: 0 became n_heads. Its place stays.
  void resolve(const std::string& name, int64_t value) { store(name, ConfigNode::of(value)); }
  void resolve(const std::string& name, bool value) { store(name, ConfigNode::of(value)); }

  /// ConfigError at the option's place, or at the section's when the user did not write it.
  [[noreturn]] void fail(const std::string& name, const std::string& message, const std::string& suggestion = "") const;
  /// Refuses keys that nobody read, with the nearest valid name; puts the entries into the order of reading.
  void finish();

 private:
  ConfigNode* take(const std::string& name);
  void store(const std::string& name, ConfigNode value);
  ConfigNode& section_;
  std::vector<std::string> names_;
};

}  // namespace core
}  // namespace krait

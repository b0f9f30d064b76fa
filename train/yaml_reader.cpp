#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <sstream>

#include "data/utf8.h"
#include "train/yaml.h"

namespace krait::train {
namespace {

constexpr int64_t kMaxNodes = 100'000;      // a config has hundreds; nested aliases can make billions
constexpr int64_t kMaxFileBytes = 4 << 20;  // whoever passes a token store as a config learns it at once

int64_t count_nodes(const ConfigNode& node) {
  int64_t count = 1;
  for (const ConfigNode& item : node.items()) count += count_nodes(item);
  for (const auto& [key, value] : node.entries()) count += count_nodes(value);
  return count;
}

/// Builds the tree from the parser's events. (yaml-cpp's own nodes lose duplicate keys and the places of keys.)
class TreeBuilder final : public YAML::EventHandler {
 public:
  explicit TreeBuilder(std::string source) : source_(std::make_shared<const std::string>(std::move(source))) {}

  ConfigNode take_root() { return std::move(root_); }
  SourceMark mark_of(const YAML::Mark& mark) const {
    return mark.is_null() ? SourceMark{source_, 0, 0} : SourceMark{source_, mark.line + 1, mark.column + 1};
  }
  [[noreturn]] void fail(const YAML::Mark& mark, const std::string& message) const {
    ConfigNode node;
    node.set_mark(mark_of(mark));
    node.fail(message);
  }

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override { add(mark, ConfigNode(), anchor); }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    const auto found = anchors_.find(anchor);
    if (found == anchors_.end()) fail(mark, "an alias inside its own anchor");
    nodes_ += count_nodes(found->second);
    add(mark, found->second, YAML::NullAnchor);
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    const bool string_tag = tag == "tag:yaml.org,2002:str";
    if (!string_tag && tag != "?" && tag != "!" && !tag.empty()) fail(mark, "found tag " + tag + ", expected a plain value");
    add(mark, ConfigNode::scalar(value, tag == "!" || string_tag), anchor);
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(mark, ConfigNode::list(), anchor);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(mark, ConfigNode::map(), anchor);
  }
  void OnMapEnd() override { close(); }

 private:
  struct Open {
    ConfigNode node;
    YAML::Mark mark;
    YAML::anchor_t anchor;
    std::string key;  // of the entry whose value comes next
    SourceMark key_mark;
    bool has_key = false;
  };

  void open(const YAML::Mark& mark, ConfigNode node, YAML::anchor_t anchor) {
    if (!stack_.empty() && stack_.back().node.is_map() && !stack_.back().has_key) fail(mark, "a key must be a plain word");
    stack_.push_back({std::move(node), mark, anchor, {}, {}, false});
  }
  void close() {
    Open top = std::move(stack_.back());
    stack_.pop_back();
    add(top.mark, std::move(top.node), top.anchor);
  }
  void add(const YAML::Mark& mark, ConfigNode node, YAML::anchor_t anchor) {
    if (++nodes_ > kMaxNodes) fail(mark, fmt::format("more than {} values: not a config", kMaxNodes));
    if (anchor != YAML::NullAnchor) anchors_[anchor] = node;
    node.set_mark(mark_of(mark));
    if (stack_.empty()) {
      root_ = std::move(node);
      return;
    }
    Open& top = stack_.back();
    if (top.node.is_list()) {
      top.node.append(std::move(node));
    } else if (!top.has_key) {
      take_key(mark, node);
    } else {
      node.set_mark(top.key_mark);
      top.node.set(top.key, std::move(node));
      top.has_key = false;
    }
  }
  void take_key(const YAML::Mark& mark, const ConfigNode& node) {
    Open& top = stack_.back();
    if (!node.is_scalar() || node.text().empty()) fail(mark, "a key must be a plain word");
    if (const ConfigNode* first = top.node.find(node.text())) {
      fail(mark, fmt::format("duplicate key '{}'; it was first given at line {}", node.text(), first->mark().line));
    }
    top.key = node.text();
    top.key_mark = mark_of(mark);
    top.has_key = true;
  }

  std::shared_ptr<const std::string> source_;
  std::vector<Open> stack_;
  std::map<YAML::anchor_t, ConfigNode> anchors_;
  ConfigNode root_;
  int64_t nodes_ = 0;
};

/// YAML is indented with spaces alone, which its parser tells in riddles. The first tab in front of something, at most in
/// line `last` (from 0).
std::optional<YAML::Mark> indenting_tab(const std::string& text, int last) {
  YAML::Mark mark;
  mark.line = 0;
  for (size_t begin = 0; begin < text.size() && mark.line <= last; ++mark.line) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    const size_t tab = text.find('\t', begin), word = text.find_first_not_of(" \t\r", begin);
    if (tab < word && word < end && text[word] != '#') {
      mark.column = static_cast<int>(tab - begin);
      return mark;
    }
    begin = end + 1;
  }
  return {};
}

/// Gives every node below the mark of the override that wrote it.
void set_marks(ConfigNode& node, const SourceMark& mark) {
  node.set_mark(mark);
  for (ConfigNode& item : node.items()) set_marks(item, mark);
  for (auto& [key, value] : node.entries()) set_marks(value, mark);
}

}  // namespace

ConfigNode parse_yaml(const std::string& text, const std::string& source) {
  TreeBuilder builder(source);
  // What names files and stands in JSON must be text. (UTF-16 is known by its first bytes, and YAML's own.)
  const bool utf16 = text.starts_with("\xFF\xFE") || text.starts_with("\xFE\xFF");
  if (const size_t bad = utf16 ? std::string::npos : data::utf8::find_invalid(text); bad != std::string::npos)
    throw ConfigError(fmt::format("{}: byte {}: 0x{:02X} is not UTF-8", source, bad, static_cast<unsigned char>(text[bad])));
  try {
    std::istringstream stream(text);
    YAML::Parser parser(stream);
    if (parser.HandleNextDocument(builder)) {
      TreeBuilder second(source);
      if (parser.HandleNextDocument(second)) {
        const SourceMark mark = second.take_root().mark();
        throw ConfigError(fmt::format("{}: a second YAML document begins here; a config is one document", mark.str()));
      }
    }
  } catch (const YAML::Exception& e) {
    if (const auto tab = indenting_tab(text, e.mark.line)) builder.fail(*tab, "not valid YAML: a tab in front; indent with spaces");
    builder.fail(e.mark, "not valid YAML: " + e.msg);
  }
  ConfigNode root = builder.take_root();
  root.set_path("");
  return root;
}

ConfigNode read_yaml_file(const std::string& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (std::filesystem::is_directory(status)) throw ConfigError(path + ": is a directory, expected a YAML file");
  const bool regular = std::filesystem::is_regular_file(status);
  if (regular && std::filesystem::file_size(path, error) > static_cast<uintmax_t>(kMaxFileBytes)) {
    throw ConfigError(fmt::format("{}: is larger than {} MiB, expected a YAML config", path, kMaxFileBytes >> 20));
  }
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  if (!file) throw ConfigError(fmt::format("{}: cannot be read: {}", path, std::strerror(errno ? errno : EIO)));
  std::string text(static_cast<size_t>(kMaxFileBytes), '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(file.gcount()));
  if (text.find('\0') != std::string::npos && text.compare(0, 2, "\xFF\xFE") != 0 && text.compare(0, 2, "\xFE\xFF") != 0) {
    throw ConfigError(path + ": is a binary file, expected a YAML config");
  }
  ConfigNode root = parse_yaml(text, path);
  if (root.is_null()) root.set_mark({std::make_shared<const std::string>(path), 0, 0});
  if (!root.is_null() && !root.is_map()) root.fail(fmt::format("found {}, expected a map of sections", root.describe()));
  // The file as a whole is the place of what is missing at the top.
  root.set_mark({std::make_shared<const std::string>(path), 0, 0});
  return root;
}

void apply_override(ConfigNode& tree, const std::string& assignment) {
  const std::string source = fmt::format("override '{}'", assignment);
  const auto fail = [&](const std::string& message) { throw ConfigError(source + ": " + message); };
  const size_t equals = assignment.find('=');
  if (equals == std::string::npos || equals == 0) fail("expected key.path=value");
  const SourceMark mark{std::make_shared<const std::string>(source), 0, 0};

  std::string value_text = assignment.substr(equals + 1);
  ConfigNode value;
  try {
    value = parse_yaml(value_text, source);
  } catch (const ConfigError&) {
    fail("the value is not valid YAML");
  }
  if (value.is_null() && value_text.empty()) value = ConfigNode::scalar("", true);
  set_marks(value, mark);

  // Wrap the value in the maps of its path, then merge.
  std::string path = assignment.substr(0, equals);
  while (true) {
    const size_t dot = path.rfind('.');
    const std::string key = dot == std::string::npos ? path : path.substr(dot + 1);
    if (key.empty()) fail("the key path has an empty part");
    ConfigNode parent = ConfigNode::map();
    parent.set_mark(mark);
    parent.set(key, std::move(value));
    value = std::move(parent);
    if (dot == std::string::npos) break;
    path.resize(dot);
  }
  if (tree.is_null()) {
    const SourceMark root_mark = tree.mark();
    tree = ConfigNode::map();
    tree.set_mark(root_mark);
  }
  tree.merge(value);
}

}  // namespace krait::train

#include "core/config_node.h"

#include <algorithm>
#include <charconv>
#include <numeric>

namespace krait::core {

std::string SourceMark::str() const {
  if (!source) return "config";
  return line > 0 ? fmt::format("{}:{}:{}", *source, line, column) : *source;
}

bool is_plain_non_string(std::string_view text) {
  for (const char* word : {"", "~", "null", "Null", "NULL", "true", "True", "TRUE", "false", "False", "FALSE", ".nan",
                           ".NaN", ".NAN", ".inf", ".Inf", ".INF", "-.inf", "-.Inf", "-.INF", "+.inf"}) {
    if (text == word) return true;
  }
  if (text.front() == '+') text.remove_prefix(1);
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error != std::errc::invalid_argument && end == text.data() + text.size();
}

ConfigNode ConfigNode::scalar(std::string text, bool quoted) {
  ConfigNode node(Kind::scalar);
  node.text_ = std::move(text);
  node.quoted_ = quoted;
  return node;
}

ConfigNode ConfigNode::of(const std::string& value) { return scalar(value, is_plain_non_string(value)); }

ConfigNode& ConfigNode::append(ConfigNode item) {
  KRAIT_ASSERT(is_list(), "append to {}", path_);
  item.set_path(fmt::format("{}[{}]", path_, items_.size()));
  return items_.emplace_back(std::move(item));
}

const ConfigNode* ConfigNode::find(std::string_view key) const {
  for (const Entry& entry : entries_) {
    if (entry.first == key) return &entry.second;
  }
  return nullptr;
}

ConfigNode* ConfigNode::find(std::string_view key) {
  return const_cast<ConfigNode*>(static_cast<const ConfigNode*>(this)->find(key));
}

ConfigNode& ConfigNode::set(const std::string& key, ConfigNode value) {
  KRAIT_ASSERT(is_map(), "set {} in {}", key, path_);
  value.set_path(path_.empty() ? key : path_ + "." + key);
  if (ConfigNode* existing = find(key)) return *existing = std::move(value);
  return entries_.emplace_back(key, std::move(value)).second;
}

void ConfigNode::set_path(std::string path) {
  path_ = std::move(path);
  for (Entry& entry : entries_) entry.second.set_path(path_.empty() ? entry.first : path_ + "." + entry.first);
  for (size_t i = 0; i < items_.size(); ++i) items_[i].set_path(fmt::format("{}[{}]", path_, i));
}

void ConfigNode::merge(const ConfigNode& other) {
  if (!is_map() || !other.is_map()) {
    std::string path = path_;
    *this = other;
    set_path(std::move(path));
    return;
  }
  for (const Entry& entry : other.entries_) {
    if (ConfigNode* existing = find(entry.first)) {
      existing->merge(entry.second);
    } else {
      set(entry.first, entry.second);
    }
  }
}

std::string ConfigNode::shown() const {
  std::string shown = text_.size() > 60 ? text_.substr(0, 57) + "..." : text_;
  for (char& c : shown) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = ' ';
  }
  return shown;
}

std::string ConfigNode::describe() const {
  switch (kind_) {
    case Kind::null: return "nothing";
    case Kind::list: return "a list";
    case Kind::map: return "a map";
    case Kind::scalar: break;
  }
  return !quoted_ && is_plain_non_string(text_) ? shown() : "string '" + shown() + "'";
}

void ConfigNode::fail(const std::string& message, const std::string& suggestion) const {
  std::string text = mark_.str() + ": ";
  if (!path_.empty()) text += path_ + ": ";
  text += message;
  if (!suggestion.empty()) text += "\n       try " + suggestion;
  throw ConfigError(text);
}

namespace {

// Damerau-Levenshtein (optimal string alignment): a swap of neighbours, the commonest slip, costs 1.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::vector<size_t>> d(a.size() + 1, std::vector<size_t>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i) d[i][0] = i;
  std::iota(d[0].begin(), d[0].end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    for (size_t j = 1; j <= b.size(); ++j) {
      d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
    }
  }
  return d[a.size()][b.size()];
}

}  // namespace

std::string nearest_name(std::string_view name, const std::vector<std::string>& candidates) {
  if (name.size() > 200) return {};
  std::string best;
  size_t best_distance = std::max<size_t>(1, name.size() / 2) + 1;
  for (const std::string& candidate : candidates) {
    const size_t distance = edit_distance(name, candidate);
    // A wholly different short word is no misspelling.
    if (distance < best_distance && distance < std::max(name.size(), candidate.size())) {
      best_distance = distance;
      best = candidate;
    }
  }
  return best;
}

}  // namespace krait::core

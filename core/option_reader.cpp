#include "core/option_reader.h"

#include <algorithm>
#include <charconv>
#include <cmath>

namespace krait::core {
namespace {

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

std::string limit(double value) { return fmt::format("{}", value); }

[[noreturn]] void fail_type(const ConfigNode& node, const std::string& expected) {
  node.fail(fmt::format("found {}, expected {}", node.describe(), expected));
}

std::optional<bool> parse_bool(const ConfigNode& node) {
  if (!node.is_scalar() || node.quoted()) return {};
  const std::string& t = node.text();
  if (t == "true" || t == "True" || t == "TRUE") return true;
  if (t == "false" || t == "False" || t == "FALSE") return false;
  return {};
}

template <class T>
std::optional<T> parse_number(const ConfigNode& node) {
  if (!node.is_scalar() || node.quoted()) return {};
  const char* begin = node.text().data();
  const char* end = begin + node.text().size();
  if (begin != end && *begin == '+') ++begin;
  T value{};
  const auto [stop, error] = std::from_chars(begin, end, value);
  if (error != std::errc{} || stop != end) return {};
  return value;
}

double read_number(const ConfigNode& node, const Range& range) {
  const std::optional<double> value = parse_number<double>(node);
  if (!value || !std::isfinite(*value) || !range.contains(*value)) fail_type(node, "a number" + range.str());
  return *value;
}

int64_t read_integer(const ConfigNode& node, const Range& range) {
  std::optional<int64_t> value = parse_number<int64_t>(node);
  if (!value) {
    // 2e9 tokens is a usual way to write a count.
    const std::optional<double> number = parse_number<double>(node);
    if (number && std::abs(*number) <= 0x1p53 && *number == std::floor(*number)) value = static_cast<int64_t>(*number);
  }
  if (!value || !range.contains(static_cast<double>(*value))) fail_type(node, "an integer" + range.str());
  // Sums of two such values cannot overflow.
  if (std::abs(static_cast<double>(*value)) > 0x1p61) fail_type(node, "an integer below 2^61");
  return *value;
}

std::string read_text(const ConfigNode& node, const std::string& expected) {
  if (!node.is_scalar()) fail_type(node, expected);
  return node.text();
}

}  // namespace

bool Range::contains(double value) const {
  return (open_min ? value > min : value >= min) && (open_max ? value < max : value <= max);
}

std::string Range::str() const {
  const bool lower = std::isfinite(min), upper = std::isfinite(max);
  if (lower && upper) return fmt::format(" in {}{}, {}{}", open_min ? "(" : "[", limit(min), limit(max), open_max ? ")" : "]");
  if (lower) return (open_min ? " > " : " >= ") + limit(min);
  if (upper) return (open_max ? " < " : " <= ") + limit(max);
  return {};
}

OptionReader::OptionReader(ConfigNode& section) : section_(section) {
  if (section_.is_null()) {
    ConfigNode empty = ConfigNode::map();
    empty.set_mark(section_.mark());
    empty.set_path(section_.path());
    empty.set_default(section_.is_default());
    section_ = std::move(empty);
  }
  if (!section_.is_map()) fail_type(section_, "a map of options");
}

ConfigNode* OptionReader::take(const std::string& name) {
  if (std::find(names_.begin(), names_.end(), name) == names_.end()) names_.push_back(name);
  return section_.find(name);
}

void OptionReader::store(const std::string& name, ConfigNode value) {
  const ConfigNode* existing = section_.find(name);
  value.set_default(!existing || existing->is_default());
  value.set_mark(existing ? existing->mark() : section_.mark());
  section_.set(name, std::move(value));
}

void OptionReader::read(const std::string& name, bool& value) {
  if (const ConfigNode* node = take(name)) {
    const std::optional<bool> found = parse_bool(*node);
    if (!found) fail_type(*node, "true or false");
    value = *found;
  }
  store(name, ConfigNode::of(value));
}

void OptionReader::read(const std::string& name, int64_t& value, const Range& range) {
  if (const ConfigNode* node = take(name)) value = read_integer(*node, range);
  store(name, ConfigNode::of(value));
}

void OptionReader::read(const std::string& name, double& value, const Range& range) {
  if (const ConfigNode* node = take(name)) value = read_number(*node, range);
  store(name, ConfigNode::of(value));
}

void OptionReader::read(const std::string& name, std::string& value) {
  if (const ConfigNode* node = take(name)) value = read_text(*node, "a string");
  store(name, ConfigNode::of(value));
}

void OptionReader::read(const std::string& name, std::array<double, 2>& value, const Range& range) {
  const std::string expected = "a list of 2 numbers" + range.str();
  if (const ConfigNode* node = take(name)) {
    if (!node->is_list()) fail_type(*node, expected);
    if (node->items().size() != 2) node->fail(fmt::format("found a list of {}, expected {}", node->items().size(), expected));
    for (size_t i = 0; i < 2; ++i) value[i] = read_number(node->items()[i], range);
  }
  ConfigNode list = ConfigNode::list();
  for (const double v : value) list.append(ConfigNode::of(v));
  store(name, std::move(list));
}

void OptionReader::read(const std::string& name, std::vector<std::string>& value) {
  if (const ConfigNode* node = take(name)) {
    if (!node->is_list() && !node->is_scalar()) fail_type(*node, "a list of names");
    value.clear();
    if (node->is_scalar()) value.push_back(node->text());
    for (const ConfigNode& item : node->items()) value.push_back(read_text(item, "a name"));
    if (node->is_list()) return;  // items keep their places for later messages
  }
  // Items keep a place too: that of the single name, or of the section for a default.
  const ConfigNode* node = section_.find(name);
  ConfigNode list = ConfigNode::list();
  for (const std::string& v : value) list.append(ConfigNode::of(v)).set_mark(node ? node->mark() : section_.mark());
  store(name, std::move(list));
}

void OptionReader::choice(const std::string& name, std::string& value, const std::vector<std::string>& choices) {
  if (const ConfigNode* node = take(name)) {
    const std::string expected = choices.size() == 1 ? choices[0] : "one of " + join(choices);
    const std::string found = read_text(*node, expected);
    if (std::find(choices.begin(), choices.end(), found) == choices.end()) {
      const std::string near = nearest_name(found, choices);
      node->fail(fmt::format("found '{}', expected {}", node->shown(), expected), near);
    }
    value = found;
  }
  store(name, ConfigNode::of(value));
}

void OptionReader::choice(const std::string& name, std::string& value, const std::vector<std::string>& choices,
                          const std::string& if_false, const std::string& if_true) {
  if (const ConfigNode* node = take(name)) {
    if (const std::optional<bool> flag = parse_bool(*node)) store(name, ConfigNode::of(*flag ? if_true : if_false));
  }
  choice(name, value, choices);
}

ConfigNode& OptionReader::section(const std::string& name) {
  if (!take(name)) store(name, ConfigNode::map());
  return *section_.find(name);
}

ConfigNode* OptionReader::find_section(const std::string& name) { return take(name); }

bool OptionReader::given(const std::string& name) const {
  const ConfigNode* node = section_.find(name);
  return node && !node->is_default();
}

void OptionReader::require(const std::string& name) {
  if (section_.find(name)) return;
  // The likeliest reason is that it was misspelt.
  std::vector<std::string> unread;
  for (const auto& [key, node] : section_.entries()) {
    if (std::find(names_.begin(), names_.end(), key) == names_.end()) unread.push_back(key);
  }
  const std::string near = nearest_name(name, unread);
  if (const ConfigNode* wrong = near.empty() ? nullptr : section_.find(near)) {
    wrong->fail(fmt::format("unknown key; did you mean {}?", name));
  }
  fail(name, "is required and missing");
}

void OptionReader::fail(const std::string& name, const std::string& message, const std::string& suggestion) const {
  if (const ConfigNode* node = section_.find(name)) node->fail(message, suggestion);
  ConfigNode absent;
  absent.set_mark(section_.mark());
  absent.set_path(section_.path().empty() ? name : section_.path() + "." + name);
  absent.fail(message, suggestion);
}

void OptionReader::finish() {
  for (const auto& [key, node] : section_.entries()) {
    if (std::find(names_.begin(), names_.end(), key) != names_.end()) continue;
    std::vector<std::string> sorted = names_;
    std::sort(sorted.begin(), sorted.end());
    const std::string near = nearest_name(key, sorted);
    std::string message = "unknown key";
    if (!near.empty()) message += fmt::format("; did you mean {}?", near);
    node.fail(fmt::format("{}\n       valid keys: {}", message, join(sorted)));
  }
  auto& entries = section_.entries();
  const auto rank = [&](const std::string& key) { return std::find(names_.begin(), names_.end(), key) - names_.begin(); };
  entries.sort([&](const auto& a, const auto& b) { return rank(a.first) < rank(b.first); });
}

}  // namespace krait::core

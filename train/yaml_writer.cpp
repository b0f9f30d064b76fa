#include <algorithm>
#include <cctype>

#include "train/yaml.h"

namespace krait::train {
namespace {

bool is_plain_word(const std::string& text) {
  const auto inner = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || std::string_view("_./+-").find(c) != std::string_view::npos; };
  return !text.empty() && text != "---" && text != "..." && text != "-" && std::all_of(text.begin(), text.end(), inner);
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += {'\\', c};
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\t') {
      out += "\\t";
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) {
      out += fmt::format("\\x{:02X}", static_cast<unsigned>(static_cast<unsigned char>(c)));
    } else {
      out += c;
    }
  }
  return out + "\"";
}

std::string scalar(const ConfigNode& node) {
  const std::string& text = node.text();
  const bool plain = is_plain_word(text) && (!node.quoted() || !is_plain_non_string(text));
  return plain ? text : quoted(text);
}

std::string key_text(const std::string& key) { return is_plain_word(key) && !is_plain_non_string(key) ? key : quoted(key); }

std::string flow(const ConfigNode& node) {
  if (node.is_null()) return "null";
  if (node.is_scalar()) return scalar(node);
  std::string out;
  for (const ConfigNode& item : node.items()) out += (out.empty() ? "" : ", ") + flow(item);
  for (const auto& [key, value] : node.entries()) out += (out.empty() ? "" : ", ") + key_text(key) + ": " + flow(value);
  return node.is_list() ? "[" + out + "]" : "{" + out + "}";
}

void block(const ConfigNode& map, const std::string& indent, std::string& out) {
  for (const auto& [key, value] : map.entries()) {
    out += indent + key_text(key) + ":";
    if (value.is_map() && !value.entries().empty()) {
      out += "\n";
      block(value, indent + "  ", out);
    } else {
      out += " " + flow(value) + "\n";
    }
  }
}

}  // namespace

std::string to_yaml(const ConfigNode& tree) {
  if (!tree.is_map() || tree.entries().empty()) return flow(tree) + "\n";
  std::string out;
  block(tree, "", out);
  return out;
}

}  // namespace krait::train

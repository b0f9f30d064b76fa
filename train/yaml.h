#pragma once
#include <string>
#include <vector>

#include "core/config_node.h"

namespace krait::train {

/// One YAML document to a tree that knows the place of every key. ConfigError "source:line:col: ..." for text that
/// is not YAML, for duplicate keys, several documents, tags, and aliases that grow beyond reason.
ConfigNode parse_yaml(const std::string& text, const std::string& source);
ConfigNode read_yaml_file(const std::string& path);

/// Lays `key.path=value` over the tree; the value is YAML. Maps are merged, everything else replaced.
/// Messages about it name the place "override 'key.path=value'".
void apply_override(ConfigNode& tree, const std::string& assignment);

/// The tree as YAML that parses to the same tree.
std::string to_yaml(const ConfigNode& tree);

}  // namespace krait::train

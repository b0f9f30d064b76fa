#pragma once
#include <string>
#include <utility>
#include <vector>

namespace krait::train {

inline constexpr const char* kVersion = "0.1.0";

/// Of the source this binary was built from; "unknown" outside a git checkout.
std::string git_revision();
/// Compiler and libraries with their versions, for `krait info`.
std::vector<std::pair<std::string, std::string>> build_info();

}  // namespace krait::train

#pragma once
#include <CLI/CLI.hpp>
#include <string>
#include <vector>

/// Checks of command-line values. Their messages say what was found, what is expected and the nearest valid name.
namespace krait::train::cli {

CLI::Validator positive();
CLI::Validator not_negative();
CLI::Validator from_to(double low, double high);
CLI::Validator one_of(std::vector<std::string> names);

}  // namespace krait::train::cli

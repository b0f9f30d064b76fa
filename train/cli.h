#pragma once
#include <CLI/CLI.hpp>
#include <functional>
#include <string>
#include <vector>

/// The `krait` command. One function for each subcommand, in cli_<name>.cpp: it declares the options and, when the
/// subcommand was chosen, sets the action.
namespace krait::train::cli {

using Action = std::function<int()>;
using AddCommand = void (*)(CLI::App& app, Action& action);

void add_train(CLI::App& app, Action& action);
void add_eval(CLI::App& app, Action& action);
void add_generate(CLI::App& app, Action& action);
void add_ablate(CLI::App& app, Action& action);
void add_data(CLI::App& app, Action& action);
void add_bench(CLI::App& app, Action& action);
void add_info(CLI::App& app, Action& action);
void add_plan(CLI::App& app, Action& action);

/// A line for an out-of-memory message: what users of this command can lower. Empty: nothing is known.
std::string memory_advice(const std::string& command);

/// Parses, runs, and reports errors on stderr. 0: success, 1: failure, 2: bad command line or config.
int run(int argc, const char* const* argv, const std::vector<AddCommand>& commands);

}  // namespace krait::train::cli

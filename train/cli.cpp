#include "train/cli.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <new>

#include "core/allocator.h"
#include "core/comm/job.h"
#include "core/config_node.h"
#include "train/build_info.h"

namespace krait::train::cli {
namespace {

// In a job of several processes one rank's error ends them all: the others would wait for it.
int report(const std::string& message, int status) {
  if (comm::job_size() > 1) comm::abort_job(message, status);
  std::fflush(stdout);
  std::fprintf(stderr, "error: %s\n", message.c_str());
  return status;
}

/// The chain of subcommands from the first arguments: unknown ones get the nearest name.
void check_command_names(const CLI::App& app, int argc, const char* const* argv) {
  const CLI::App* level = &app;
  std::string path = "krait";
  for (int i = 1; i < argc && argv[i][0] != '-'; ++i) {
    const auto commands = level->get_subcommands([](const CLI::App*) { return true; });
    if (commands.empty()) return;
    std::vector<std::string> names;
    const CLI::App* next = nullptr;
    for (const CLI::App* command : commands) {
      names.push_back(command->get_name());
      if (command->get_name() == argv[i]) next = command;
    }
    if (!next) {
      std::string list;
      for (const std::string& name : names) list += (list.empty() ? "" : ", ") + name;
      const std::string near = nearest_name(argv[i], names);
      throw ConfigError(fmt::format("{}: unknown command '{}'{}\n       commands: {}", path, argv[i],
                                    near.empty() ? "" : "; did you mean " + near + "?", list));
    }
    level = next;
    path += std::string(" ") + argv[i];
  }
}

std::string chosen_command(const CLI::App& app) {
  const auto chosen = app.get_subcommands();
  return chosen.empty() ? "" : chosen.front()->get_name();
}

/// CLI11's messages, on one line, with a pointer to the help of the command they are about.
std::string usage_error(const CLI::App& app, const CLI::ParseError& e) {
  std::string path = "krait";
  for (const CLI::App* level = &app; level;) {
    const auto chosen = level->get_subcommands();
    level = chosen.empty() ? nullptr : chosen.front();
    if (level) path += " " + level->get_name();
  }
  std::string message = e.what();
  while (!message.empty() && message.back() == '\n') message.pop_back();
  const bool option = message.find("not expected: --") != std::string::npos;
  const bool settings = path == "krait train" || path == "krait eval" || path == "krait generate" || path == "krait plan";
  return fmt::format("{}: {}\n       try {} --help{}", path, message, path,
                     option && settings ? "; settings of the config are given as key.path=value" : "");
}

/// What these commands print is all they make: where it is lost they have failed. (A reader that stops reading has enough.)
void check_output(const CLI::App& app) {
  bool prints = false;
  for (const char* name : {"eval", "generate", "bench", "plan", "info"}) prints = prints || app.got_subcommand(name);
  prints = prints || (app.got_subcommand("data") && app.get_subcommand("data")->got_subcommand("inspect"));
  errno = 0;
  if (!prints || (std::fflush(stdout) == 0 && !std::ferror(stdout)) || errno == EPIPE) return;
  throw Error(fmt::format("standard output: cannot be written: {}", errno ? std::strerror(errno) : "a part of it is lost"));
}

}  // namespace

std::string memory_advice(const std::string& command) {
  if (command == "generate") return "\n       try a lower --max-tokens, a shorter --prompt, or --state-dtype bf16 (Mamba-2 on a GPU)";
  if (command == "eval") return "\n       try eval.micro_batch_size=1, or a shorter --context";
  if (command == "train")
    return "\n       try a lower train.micro_batch_size, a shorter data.context, train.recompute=block, or a smaller model";
  return "";
}

int run(int argc, const char* const* argv, const std::vector<AddCommand>& commands) {
  CLI::App app("Krait trains sequence models from a YAML file.", "krait");
  app.set_version_flag("--version", fmt::format("krait {} (git {})", kVersion, git_revision()));
  app.require_subcommand(1);
  Action action;
  for (const AddCommand add : commands) add(app, action);
  try {
    check_command_names(app, argc, argv);
    app.parse(argc, argv);
    const int status = action();
    if (status == 0) check_output(app);
    return status;
  } catch (const CLI::Success& e) {  // --help, --version
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    return report(usage_error(app, e), 2);
  } catch (const ConfigError& e) {
    return report(e.what(), 2);
  } catch (const OutOfMemory& e) {
    return report(e.what() + memory_advice(chosen_command(app)), 1);
  } catch (const std::bad_alloc&) {
    return report("out of memory" + memory_advice(chosen_command(app)), 1);
  } catch (const std::filesystem::filesystem_error& e) {
    return report(fmt::format("{}: {}", e.path1().string(), e.code().message()), 1);
  } catch (const std::exception& e) {
    return report(e.what(), 1);
  }
}

}  // namespace krait::train::cli

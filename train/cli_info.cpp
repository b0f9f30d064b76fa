#include <memory>

#include "train/cli.h"
#include "train/commands.h"

namespace krait::train::cli {

void add_info(CLI::App& app, Action& action) {
  const auto command = std::make_shared<InfoCommand>();
  CLI::App* sub = app.add_subcommand("info", "This build and machine; or a run and its checkpoints");
  sub->add_option("RUN_DIR", command->run_dir, "Run directory");
  sub->add_flag("--verify", command->verify, "Check the checksums of all checkpoints");
  sub->callback([command, &action] { action = [command] { return run_info(*command); }; });
}

}  // namespace krait::train::cli

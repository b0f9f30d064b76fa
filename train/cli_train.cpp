#include <csignal>
#include <memory>

#include "core/comm/job.h"
#include "train/cli.h"
#include "train/commands.h"

namespace krait::train::cli {

void add_train(CLI::App& app, Action& action) {
  const auto command = std::make_shared<TrainCommand>();
  CLI::App* sub = app.add_subcommand("train", "Train a model from a config file");
  sub->add_option("CONFIG", command->config, "YAML file")->required();
  sub->add_option("overrides", command->overrides, "key.path=value, parsed as YAML");
  sub->add_option("--run-dir", command->run_dir, "Where the run is written [runs/<name>-<date>-<time>]");
  sub->add_flag("--resume", command->resume, "Continue the run in --run-dir from its latest whole checkpoint");
  sub->callback([command, &action] {
    action = [command] {
      // Who reads the output may end first, as `tee` does at Ctrl-C: the run goes on to its checkpoint all the same.
      std::signal(SIGPIPE, SIG_IGN);
      return comm::finish(run_train(*command));
    };
  });
}

}  // namespace krait::train::cli

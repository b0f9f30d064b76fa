#include <csignal>
#include <memory>

#include "train/cli.h"
#include "train/cli_checks.h"
#include "train/commands.h"
#include "train/launcher.h"

namespace krait::train::cli {

void add_ablate(CLI::App& app, Action& action) {
  const auto command = std::make_shared<AblateCommand>();
  CLI::App* sub = app.add_subcommand("ablate", "Train every variant of a grid and compare them: results.csv, report.html");
  sub->add_option("ABLATION", command->file, "An ablation file: base, vary, metric, claim")->required();
  sub->add_option("--jobs", command->jobs, "Runs at a time [one per GPU, or per CPU core]")->check(positive());
  sub->add_option("--run-dir", command->run_dir, "Where the runs and the report go [runs/<name>]; goes on with what is there");
  sub->callback([command, &action] {
    action = [command] {
      require_single_rank(detect_launch());
      std::signal(SIGPIPE, SIG_IGN);  // else its runs would go on without it when `tee` ends first
      return run_ablate(*command);
    };
  });
}

}  // namespace krait::train::cli

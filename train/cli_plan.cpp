#include <memory>

#include "train/cli.h"
#include "train/cli_checks.h"
#include "train/commands.h"

namespace krait::train::cli {

void add_plan(CLI::App& app, Action& action) {
  const auto command = std::make_shared<PlanCommand>();
  CLI::App* sub = app.add_subcommand("plan", "Memory, communication and time of a run on many GPUs; trains nothing");
  sub->add_option("CONFIG", command->config, "YAML file");
  sub->add_option("overrides", command->overrides, "key.path=value, parsed as YAML");
  sub->add_option("--ranks", command->ranks, "GPUs of the job [1]")->check(from_to(1, 100000));
  sub->add_option("--machine", command->machine, "Kind of GPU in the hardware table [h100-sxm]");
  sub->add_option("--hardware", command->hardware, "A hardware table of your own (YAML)");
  sub->add_flag("--show-hardware", command->show_hardware, "Print the built-in hardware table and stop");
  sub->add_flag("--json", command->json, "One JSON object");
  sub->callback([command, &action] { action = [command] { return run_plan(*command); }; });
}

}  // namespace krait::train::cli

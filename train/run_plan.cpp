#include <fmt/format.h>

#include "train/commands.h"
#include "train/plan.h"

namespace krait::train {

int run_plan(const PlanCommand& command) {
  if (command.show_hardware) {
    fmt::print("{}", machine_table());
    return 0;
  }
  if (command.config.empty()) throw ConfigError("krait plan: no config\n       try krait plan CONFIG.yaml");
  std::vector<std::string> overrides = command.overrides;
  overrides.push_back("runtime.device=cpu");  // whatever GPU the run is for, none is needed here
  const Config config = load_config(command.config, overrides);
  const Machine machine = find_machine(command.machine, command.hardware);
  const Plan plan = make_plan(config, command.ranks, machine);
  fmt::print("{}", command.json ? plan_json(plan, machine) : plan_text(plan, config, machine));
  return 0;
}

}  // namespace krait::train

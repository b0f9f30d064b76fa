#include <fmt/format.h>

#include "train/auto_mesh.h"
#include "train/commands.h"

namespace krait::train {

int run_plan(const PlanCommand& command) {
  if (command.show_hardware) {
    fmt::print("{}", machine_table());
    return 0;
  }
  if (command.config.empty()) throw ConfigError("krait plan: no config\n       try krait plan CONFIG.yaml");
  std::vector<std::string> overrides = command.overrides;
  overrides.push_back("runtime.device=cpu");  // whatever GPU the run is for, none is needed here
  Config config = load_config(command.config, overrides);
  const Machine machine = find_machine(command.machine, command.hardware);
  if (config.parallelism.automatic) {
    const Launch launch{.world_size = static_cast<int>(command.ranks), .launcher = "--ranks"};
    const MeshChoice choice = choose_mesh(config, launch, machine);
    if (!command.json) fmt::print("{}", explain(choice, config, machine));
    use_mesh(config, choice.mesh());  // where nothing fits, the smallest: the plan warns
  }
  const Plan plan = make_plan(config, command.ranks, machine);
  fmt::print("{}", command.json ? plan_json(plan, machine) : plan_text(plan, config, machine));
  return 0;
}

}  // namespace krait::train

#include <memory>

#include "train/cli.h"
#include "train/cli_checks.h"
#include "train/commands.h"
#include "train/launcher.h"

namespace krait::train::cli {

void add_eval(CLI::App& app, Action& action) {
  const auto command = std::make_shared<EvalCommand>();
  CLI::App* sub = app.add_subcommand("eval", "Perplexity of a trained model on held-out data, accuracy or error of a task");
  sub->add_option("RUN_DIR", command->run_dir, "Run directory")->required();
  sub->add_option("overrides", command->overrides, "key.path=value, parsed as YAML");
  sub->add_option("--data", command->data, "A token store or a text other than the run's");
  sub->add_option("--split", command->split, "Split [eval.split]");
  sub->add_option("--context", command->context, "Tokens of a window [eval.context]")->check(positive());
  sub->add_option("--stride", command->stride, "Tokens between windows [eval.stride]")->check(positive());
  sub->add_flag("--json", command->json, "One JSON object on standard output");
  sub->callback([command, &action] {
    action = [command] {
      require_single_rank(detect_launch());
      return run_eval(*command);
    };
  });
}

}  // namespace krait::train::cli

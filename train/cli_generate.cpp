#include <memory>

#include "train/cli.h"
#include "train/cli_checks.h"
#include "train/commands.h"
#include "train/launcher.h"

namespace krait::train::cli {

void add_generate(CLI::App& app, Action& action) {
  const auto command = std::make_shared<GenerateCommand>();
  CLI::App* sub = app.add_subcommand("generate", "Continue a text with a trained model");
  sub->add_option("RUN_DIR", command->run_dir, "Run directory")->required();
  sub->add_option("overrides", command->overrides, "key.path=value, parsed as YAML");
  sub->add_option("--prompt", command->prompt, "Text to continue");
  sub->add_option("--max-tokens", command->max_tokens, "Tokens to generate")->capture_default_str()->check(from_to(1, 1 << 30));
  sub->add_option("--temperature", command->temperature, "0: always the likeliest token")->capture_default_str()
      ->check(not_negative());
  sub->add_option("--top-p", command->top_p, "Draw from the likeliest tokens of this total probability")->capture_default_str()
      ->check(from_to(0, 1));
  sub->add_option("--state-dtype", command->state_dtype, "What states of Mamba-2 (of mLSTM, more than 8 sequences) are kept in; bf16 on GPUs, half the memory")
      ->capture_default_str()->check(one_of({"fp32", "bf16"}));
  sub->add_option_function<uint64_t>("--seed", [command](const uint64_t& seed) { command->seed = seed; }, "[the run's]")
      ->check(from_to(0, 0x1p64));  // else -1 would wrap round
  sub->callback([command, &action] {
    action = [command] {
      require_single_rank(detect_launch());
      return run_generate(*command);
    };
  });
}

}  // namespace krait::train::cli

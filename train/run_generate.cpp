#include "train/commands.h"
#include "train/generate.h"
#include "train/run_state.h"

namespace krait::train {

int run_generate(const GenerateCommand& command) {
  LoadedRun run = load_finished_run(command.run_dir, command.overrides);
  GenerateOptions options;
  options.prompt = command.prompt;
  options.max_tokens = command.max_tokens;
  options.temperature = command.temperature;
  options.top_p = command.top_p;
  options.states = dtype_from_name(command.state_dtype);
  options.seed = command.seed.value_or(static_cast<uint64_t>(run.session.config.seed));
  std::string before = command.prompt;  // not written when it turns out to be wrong
  generate(run.session, options, [&](const std::string& text) {
    fmt::print("{}{}", before, text);
    std::fflush(stdout);
    before.clear();
  });
  fmt::print("{}\n", before);
  return 0;
}

}  // namespace krait::train

#include <memory>

#include "train/cli.h"
#include "train/cli_checks.h"
#include "train/commands.h"
#include "train/launcher.h"

namespace krait::train::cli {
namespace {

void add_kind(CLI::App& bench, Action& action, const char* what, const char* help) {
  const auto command = std::make_shared<BenchCommand>();
  command->what = what;
  CLI::App* sub = bench.add_subcommand(what, help);
  sub->add_option("--filter", command->filter, "Only rows whose name has all these words");
  sub->add_option("--device", command->device, "Where")->check(one_of({"auto", "cpu", "cuda"}))->capture_default_str();
  sub->add_option("--time", command->seconds, "Seconds of timed work in a row [kernels 0.25, others 2]")->check(positive());
  sub->add_option("--json", command->json, "Write a report to this file");
  sub->add_option("--baseline", command->baseline, "Compare with an earlier report; exit with 1 when a row is slower");
  sub->add_option("--margin", command->margin, "Share of the baseline's time that counts as slower")->check(from_to(0, 10))
      ->capture_default_str();
  sub->add_option("--only", command->only)->group("");  // for the processes that bench train starts
  sub->add_flag("--list", command->list, "Print the rows' names");
  sub->callback([command, &action] {
    action = [command] {
      require_single_rank(detect_launch());
      return run_bench(*command);
    };
  });
}

}  // namespace

void add_bench(CLI::App& app, Action& action) {
  CLI::App* sub = app.add_subcommand("bench", "How fast this machine runs kernels and training steps, and how fast it could");
  sub->require_subcommand(1);
  add_kind(*sub, action, "kernels", "Every kernel, checked and timed against the machine's ceilings");
  add_kind(*sub, action, "train", "Whole training steps of known models on random data, a process each");
  add_kind(*sub, action, "decode", "Tokens one after another: prompt 64, 256 new ones, random weights");
  add_kind(*sub, action, "lengths", "Time and memory of each kind of layer from 512 to 512k positions");
}

}  // namespace krait::train::cli

#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <thread>

#include "core/device.h"
#include "core/parallel.h"
#include "train/ablation_report.h"
#include "train/child_process.h"
#include "train/commands.h"
#include "train/config.h"
#include "train/run_directory.h"
#include "train/signals.h"

namespace krait::train {

namespace fs = std::filesystem;

namespace {

// Where the variants run: how many at once, on which devices, with how many CPU threads each.
struct Slots {
  int64_t jobs = 1, threads = 0;
  int devices = 0;  // GPUs to share out; 0: CPU

  static Slots of(const Ablation& ablation, int64_t jobs) {
    const Config config = load_config(ablation.variants.front().base, ablation.variants.front().overrides);
    Slots s;
    s.devices = config.runtime.device == "cpu" ? 0 : cuda_device_count();
    s.jobs = jobs > 0 ? jobs : s.devices > 0 ? s.devices : num_threads();
    s.jobs = std::min(s.jobs, static_cast<int64_t>(ablation.variants.size()));
    if (config.runtime.threads == 0) s.threads = std::max<int64_t>(1, num_threads() / s.jobs);
    return s;
  }
};

std::string last_line_of(const std::string& log) {
  const std::string text = fs::exists(log) ? read_file(log) : "";
  const size_t error = text.rfind("error: ");
  const size_t begin = error != std::string::npos ? error : text.find_last_of('\n', text.size() < 2 ? 0 : text.size() - 2) + 1;
  return text.substr(begin, text.find('\n', begin) - begin);
}

/// Runs the variants, so many at a time, each a `krait train` of its own.
class Runner {
 public:
  Runner(const Ablation& ablation, std::string directory, const Slots& slots)
      : ablation_(ablation), directory_(std::move(directory)), slots_(slots), results_(ablation.variants.size()),
        slot_taken_(static_cast<size_t>(slots.jobs), false) {}

  /// Returns whether all was run; false after a signal.
  bool run() {
    const StopSignals signals;
    size_t next = 0;
    while (true) {
      collect();
      if (stop_requested()) {
        for (Job& job : jobs_) job.process.interrupt();
        while (!jobs_.empty()) collect(), pause();
        return false;
      }
      while (static_cast<int64_t>(jobs_.size()) < slots_.jobs && next < ablation_.variants.size()) start(next++);
      if (jobs_.empty() && next == ablation_.variants.size()) return true;
      pause();
    }
  }
  const std::vector<VariantResult>& results() const { return results_; }

 private:
  struct Job {
    size_t variant, slot;
    ChildProcess process;
  };

  static void pause() { std::this_thread::sleep_for(std::chrono::milliseconds(50)); }
  std::string run_dir(size_t i) const { return directory_ + "/runs/" + ablation_.variants[i].name; }
  std::string log_file(size_t i) const { return directory_ + "/logs/" + ablation_.variants[i].name + ".log"; }

  // A run that is finished and was made with the same config needs nothing; one with another config is refused.
  bool is_done(size_t i) const {
    const std::string config_file = run_dir(i) + "/config.yaml";
    if (!fs::exists(config_file)) return false;
    const Config wanted = load_config(ablation_.variants[i].base, ablation_.variants[i].overrides);
    for (const std::string& line : config_differences(load_config(config_file).tree, wanted.tree)) {
      if (line.rfind("name:", 0) == 0 || line.rfind("runtime.threads:", 0) == 0) continue;
      throw ConfigError(fmt::format("{} was run with another config ({}); remove it, or give another --run-dir", run_dir(i), line));
    }
    return read_variant_result(ablation_, run_dir(i)).status == "finished";
  }

  void start(size_t i) {
    const Variant& v = ablation_.variants[i];
    if (is_done(i)) {
      results_[i] = read_variant_result(ablation_, run_dir(i));
      report(i, "finished before");
      return;
    }
    size_t slot = 0;
    while (slot_taken_[slot]) ++slot;
    slot_taken_[slot] = true;
    std::vector<std::string> arguments{own_program(), "train", v.base};
    arguments.insert(arguments.end(), v.overrides.begin(), v.overrides.end());
    if (slots_.threads > 0) arguments.push_back(fmt::format("runtime.threads={}", slots_.threads));
    arguments.insert(arguments.end(), {"--run-dir", run_dir(i), "--resume"});
    std::vector<std::pair<std::string, std::string>> environment;
    if (slots_.devices > 0)
      environment.emplace_back("CUDA_VISIBLE_DEVICES", fmt::format("{}", slot % static_cast<size_t>(slots_.devices)));
    fs::create_directories(directory_ + "/logs");
    jobs_.push_back({i, slot, ChildProcess(arguments, environment, log_file(i))});
  }

  void collect() {
    for (size_t k = 0; k < jobs_.size();) {
      int status = 0;
      if (jobs_[k].process.running(status)) {
        ++k;
        continue;
      }
      const size_t i = jobs_[k].variant;
      slot_taken_[jobs_[k].slot] = false;
      jobs_.erase(jobs_.begin() + static_cast<int64_t>(k));
      results_[i] = read_variant_result(ablation_, run_dir(i));
      results_[i].log = log_file(i);
      if (status != 0) {
        results_[i].status = "failed";
        results_[i].metric.reset();
        results_[i].error = fmt::format("exit status {}: {}", status, last_line_of(log_file(i)));
      }
      report(i, results_[i].status);
    }
  }

  void report(size_t i, const std::string& what) {
    ++done_;
    const VariantResult& r = results_[i];
    fmt::print("[{}/{}] {}: {}{}{}\n", done_, ablation_.variants.size(), ablation_.variants[i].name, what,
               r.metric ? fmt::format(", {} {:.4f}", ablation_.metric, *r.metric) : "",
               r.error.empty() ? "" : fmt::format(" ({}; see {})", r.error, r.log));
    std::fflush(stdout);
  }

  const Ablation& ablation_;
  std::string directory_;
  Slots slots_;
  std::vector<VariantResult> results_;
  std::vector<bool> slot_taken_;
  std::vector<Job> jobs_;
  size_t done_ = 0;
};

}  // namespace

int run_ablate(const AblateCommand& command) {
  const Ablation ablation = load_ablation(command.file);
  const std::string directory = command.run_dir.empty() ? "runs/" + ablation.name : command.run_dir;
  const Slots slots = Slots::of(ablation, command.jobs);
  fs::create_directories(directory);
  const FileDescriptor lock = lock_directory(directory, "running an ablation");  // two would take each other's runs for failed
  fmt::print("ablation {}: {} runs, {} at a time on {}; results in {}\n", ablation.name, ablation.variants.size(), slots.jobs,
             slots.devices > 0 ? fmt::format("{} GPU(s)", slots.devices) : std::string("the CPU"), directory);
  std::fflush(stdout);
  Runner runner(ablation, directory, slots);
  const bool whole = runner.run();
  write_file_atomic(directory + "/results.csv", results_csv(ablation, runner.results()));
  write_file_atomic(directory + "/report.html",
                    report_html(ablation, runner.results(), fmt::format("krait ablate {}", command.file)));
  const std::vector<GroupResult> groups = group_results(ablation, runner.results());
  fmt::print("\n{}", results_table(ablation, groups));
  for (const ClaimCheck& check : check_claim(ablation, groups)) fmt::print("claim: {}\n", check.text);
  fmt::print("{0}/results.csv\n{0}/report.html\n", directory);
  if (!whole) fmt::print("interrupted: the same command goes on where it stopped\n");
  int64_t failed = 0;
  for (const VariantResult& r : runner.results()) failed += r.status == "failed" ? 1 : 0;
  KRAIT_CHECK(failed == 0, "{} of {} runs failed; their logs are in {}/logs", failed, ablation.variants.size(), directory);
  return whole ? 0 : 1;
}

}  // namespace krait::train

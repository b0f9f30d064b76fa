#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "core/device.h"
#include "core/parallel.h"
#include "train/build_info.h"
#include "train/checkpoint.h"
#include "train/commands.h"
#include "train/launcher.h"
#include "train/progress.h"
#include "train/run_directory.h"
#include "train/yaml.h"

namespace krait::train {
namespace {

void line(const std::string& name, const std::string& value) { std::printf("%-14s %s\n", name.c_str(), value.c_str()); }

int machine_info() {
  for (const auto& [name, value] : build_info()) line(name, value);
  const DeviceInfo cpu = device_info(kCpu);
  line("cpu", fmt::format("{}, {} threads, {}", cpu.name, num_threads(), human_bytes(cpu.total_bytes)));
  for (int i = 0; i < cuda_device_count(); ++i) {
    const DeviceInfo gpu = device_info(cuda_device(i));
    line(cuda_device(i).str(), fmt::format("{}, compute capability {}.{}, {} multiprocessors, {}", gpu.name,
                                           gpu.compute_capability / 10, gpu.compute_capability % 10, gpu.multiprocessors,
                                           human_bytes(gpu.total_bytes)));
  }
  if (cuda_device_count() == 0) line("cuda devices", "none");
  const Launch launch = detect_launch();
  if (!launch.launcher.empty()) line("launcher", fmt::format("{}: rank {} of {}", launch.launcher, launch.rank, launch.world_size));
  return 0;
}

/// One line of settings from a section of the config, those that exist.
std::string settings(const ConfigNode& tree, const std::string& section, const std::vector<std::string>& keys) {
  std::string text;
  const ConfigNode* node = tree.find(section);
  for (const std::string& key : keys) {
    const ConfigNode* value = node ? node->find(key) : nullptr;
    if (!value) continue;
    std::string yaml = to_yaml(*value);
    yaml.pop_back();
    text += fmt::format("{}{} {}", text.empty() ? "" : ", ", key, yaml);
  }
  return text;
}

void print_config(const RunDirectory& run) {
  // Read as a tree, not as a config: a run of another machine or build is described all the same.
  const ConfigNode tree = read_yaml_file(run.config_file());
  line("run", run.path());
  if (const ConfigNode* name = tree.find("name")) line("name", name->text());
  line("model", settings(tree, "model", {"type", "d_model", "n_layers", "layers", "vocab_size"}));
  line("data", settings(tree, "data", {"type", "path", "context"}));
  line("optimizer", settings(tree, "optimizer", {"type", "lr", "weight_decay"}));
  line("train", settings(tree, "train", {"steps", "tokens", "tokens_per_step", "micro_batch_size"}));
  line("runtime", settings(tree, "runtime", {"device", "precision"}));
}

void print_last_metrics(const RunDirectory& run) {
  if (!std::filesystem::exists(run.metrics_file())) return line("metrics", "none yet");
  const std::string text = read_file(run.metrics_file());
  std::string step, evaluation;
  for (size_t begin = 0, end; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1) {
    const std::string entry = text.substr(begin, end - begin);
    const auto json = nlohmann::json::parse(entry, nullptr, false);
    if (json.is_object()) (json.contains("split") ? evaluation : step) = entry;
  }
  line("last step", step.empty() ? "none" : step);
  line("last eval", evaluation.empty() ? "none" : evaluation);
  if (std::filesystem::exists(run.summary_file())) {
    const auto json = nlohmann::json::parse(read_file(run.summary_file()), nullptr, false);
    if (json.is_object()) line("status", json.value("status", "?"));
  } else {
    line("status", "no summary: running, or killed; --resume continues it");
  }
}

int run_info_of(const InfoCommand& command) {
  const RunDirectory run = RunDirectory::open(command.run_dir);
  print_config(run);
  print_last_metrics(run);
  const auto all = list_checkpoints(run.checkpoints(), command.verify);
  if (all.empty()) line("checkpoints", "none");
  size_t damaged = 0, newer = 0;
  for (const CheckpointInfo& info : all) {
    const std::string state = !info.problem.empty() ? info.problem : command.verify ? "checksums match" : "";
    line(checkpoint_name(info.step), fmt::format("{}{}  {}", human_bytes(info.bytes), info.best ? "  best" : "", state));
    newer += info.newer;
    damaged += !info.problem.empty() && !info.newer;
  }
  if (damaged > 0) {
    throw Error(fmt::format("{}: {} of {} checkpoints damaged", run.checkpoints(), damaged, all.size()));
  }
  if (newer > 0) throw Error(fmt::format("{}: {} of {} checkpoints are for a newer Krait", run.checkpoints(), newer, all.size()));
  return 0;
}

}  // namespace

int run_info(const InfoCommand& command) {
  if (!command.run_dir.empty()) return run_info_of(command);
  if (command.verify) throw ConfigError("--verify: of which run?\n       try krait info RUN_DIR --verify");
  return machine_info();
}

}  // namespace krait::train

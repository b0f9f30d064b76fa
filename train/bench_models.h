#pragma once
#include <string>
#include <vector>

#include "train/session.h"

namespace krait::train::bench {

/// A model to measure, made in memory: its config, and random data of the shape it learns.
struct BenchModel {
  std::string name;      // "gpt2-124m B16 T1024"
  std::string base;      // of the config: which of the models below
  int64_t batch = 1, context = 1;
  bool cuda = true;      // sized for a GPU, or for a CPU
  double goal_ms = 0;    // of a step; 0: none
};
const std::vector<BenchModel>& bench_models();

/// The whole config, on the device; `extra` are overrides, key.path=value.
Config bench_config(const BenchModel& model, Device device, const std::vector<std::string>& extra = {});
/// The session that `krait train` would make of it.
Session bench_session(const Config& config);
/// A random micro-batch of its data.
data::Batch random_batch(const Config& config, int64_t step);

}  // namespace krait::train::bench

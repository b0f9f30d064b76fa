#pragma once
#include <functional>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace krait::train::bench {

struct MeasureOptions {
  double seconds = 0.25;  // of timed work, about; at least `min_laps`
  int64_t min_laps = 5, max_laps = 200;
  bool cold = true;       // on CUDA: the L2 cache is overwritten before each lap
  bool graph = true;      // on CUDA: the work is captured once and replayed
};

/// What was measured: quantiles over the laps.
struct Timing {
  double median_ms = 0, p10_ms = 0, p90_ms = 0;
  int64_t laps = 0;
  int64_t extra_bytes = 0;  // device memory beyond what was there before, at most during one lap
  std::string method;       // how, in words
};

/// Runs `work` twice to warm up, then times it lap by lap: with events around the replay of a CUDA graph (or plain
/// launches, where the work cannot be captured), by the clock on a CPU. `work` must leave no tensor behind.
Timing measure(Device device, const std::function<void()>& work, const MeasureOptions& options);

/// The quantiles of given laps, in milliseconds.
Timing summarize(std::vector<double> laps);

}  // namespace krait::train::bench

#include "train/bench_timing.h"

#include <algorithm>
#include <cmath>

#include "core/allocator.h"
#include "core/device_timer.h"
#include "core/stream.h"

namespace krait::train::bench {

namespace {

constexpr int64_t kFlushBytes = int64_t{192} << 20;  // several times the L2 cache of any GPU

// The work as one graph; empty where something in it waits for the device.
std::unique_ptr<CapturedGraph> capture(Device device, MemoryPool& pool, const std::function<void()>& work) {
  auto graph = std::make_unique<CapturedGraph>(device);
  const MemoryPool::Scope scope(pool);
  bool recorded = true;
  graph->begin();
  try {
    work();
  } catch (const Error&) {
    recorded = false;
  }
  try {
    graph->end();
  } catch (const Error&) {
    recorded = false;
  }
  if (!recorded) graph.reset();
  return graph;
}

std::vector<double> time_laps(Device device, int64_t laps, Tensor& flush, const std::function<void()>& work) {
  DeviceTimer timer(device, laps);
  for (int64_t i = 0; i < laps; ++i) {
    if (flush.defined()) fill_(flush, static_cast<double>(i % 7));
    timer.begin(i);
    work();
    timer.end(i);
  }
  return timer.milliseconds();
}

}  // namespace

Timing summarize(std::vector<double> laps) {
  KRAIT_ASSERT(!laps.empty(), "no laps were timed");
  std::sort(laps.begin(), laps.end());
  const auto at = [&](double q) {
    const double place = q * static_cast<double>(laps.size() - 1);
    const auto low = static_cast<size_t>(place);
    const size_t high = std::min(low + 1, laps.size() - 1);
    return laps[low] + (place - static_cast<double>(low)) * (laps[high] - laps[low]);
  };
  Timing t;
  t.median_ms = at(0.5);
  t.p10_ms = at(0.1);
  t.p90_ms = at(0.9);
  t.laps = static_cast<int64_t>(laps.size());
  return t;
}

Timing measure(Device device, const std::function<void()>& work, const MeasureOptions& options) {
  work();
  synchronize(device);
  Allocator& memory = allocator(device);
  memory.reset_peak();
  const int64_t before = memory.stats().current_bytes;
  work();
  synchronize(device);
  const int64_t extra = memory.stats().peak_bytes - before;

  MemoryPool pool(device);
  std::unique_ptr<CapturedGraph> graph;
  if (device.is_cuda() && options.graph) graph = capture(device, pool, work);
  const std::function<void()> lap = graph ? std::function<void()>([&] { graph->replay(); }) : work;
  Tensor flush;
  if (device.is_cuda() && options.cold) flush = empty({kFlushBytes / 4}, DType::f32, device);

  lap();
  const double first = summarize(time_laps(device, device.is_cuda() ? 3 : 1, flush, lap)).median_ms;
  const double per_lap = first + (flush.defined() ? 0.1 : 0.0);
  const auto wanted = static_cast<int64_t>(std::ceil(1e3 * options.seconds / std::max(per_lap, 1e-3)));
  Timing t = summarize(time_laps(device, std::clamp(wanted, options.min_laps, options.max_laps), flush, lap));
  t.extra_bytes = extra;
  t.method = device.is_cpu() ? "clock, warm caches"
                             : std::string(graph ? "events around a captured graph" : "events around launches") +
                                   (flush.defined() ? ", L2 overwritten before each lap" : "");
  synchronize(device);
  return t;
}

}  // namespace krait::train::bench

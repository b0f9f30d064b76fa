#include "kernels/cuda/recurrence_plan.h"

#include <algorithm>
#include <limits>
#include <optional>

namespace krait::kernels::cuda {

namespace {

constexpr int64_t kThreads = 256, kWarps = 8;

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The plan for a tile and a split, if it fits.
std::optional<RecurrencePlan> try_plan(const RecurrenceSizes& s, const GpuLimits& gpu, int64_t tile, int64_t split,
                                       bool resident) {
  const bool mma = s.dtype == DType::bf16;
  const int64_t sum = s.dtype == DType::f64 ? 8 : 4, element = size_of(s.dtype), value = mma ? 2 : sum;
  const int64_t units = divide_up(s.units, split);
  const int64_t rows = up(units * s.rows_per_unit, mma ? 32 : 4), depth = up(s.units * s.vector_per_unit, 16);
  const int64_t work = mma ? rows / 32 * (tile / 8) : rows / 4 * (tile / 8);
  const int64_t k_split = mma ? std::clamp<int64_t>(kWarps / work, 1, std::max<int64_t>(1, depth / 32))
                              : std::clamp<int64_t>(kThreads / work, 1, std::min<int64_t>(16, depth / 8));
  const int64_t weights = resident ? up(mma ? rows * (depth + 8) * 2 : rows * depth * element, 128) : 0;
  const int64_t partial = up(k_split * tile * rows * sum, 128), state = up(s.states * units * tile * sum, 128);
  const int64_t left = gpu.shared - weights - partial - state;
  const int64_t pad = mma ? 8 : 0;
  int64_t chunk = std::min(depth, (left / (tile * value) - pad) / 16 * 16);
  if (chunk < std::min<int64_t>(depth, 64)) return {};
  const int64_t vector = up(tile * (chunk + pad) * value, 128);
  RecurrencePlan p{};
  p.tile = static_cast<int>(tile);
  p.split = static_cast<int>(split);
  p.units = static_cast<int>(units);
  p.rows = static_cast<int>(rows);
  p.depth = static_cast<int>(depth);
  p.chunk = static_cast<int>(chunk);
  p.k_split = static_cast<int>(k_split);
  p.resident = resident;
  p.exchange = split > 1 || chunk < depth;
  p.groups = s.heads * divide_up(s.batch, tile);
  p.concurrent = split == 1 ? p.groups : gpu.multiprocessors / split;
  p.vector_at = weights;
  p.partial_at = p.vector_at + vector;
  p.state_at = p.partial_at + partial;
  p.shared = p.state_at + state;
  return p;
}

// Cycles per step, times the waves of blocks: products at a rate that shared memory allows, the cell, the barriers.
double cost(const RecurrencePlan& p, const RecurrenceSizes& s, const GpuLimits& gpu) {
  const double rate = s.dtype == DType::bf16 ? 500 : s.dtype == DType::f64 ? 25 : 60;
  const int64_t at_once = p.split == 1 ? gpu.multiprocessors : p.concurrent;
  const double product = static_cast<double>(p.rows) * p.depth * p.tile / rate * (p.resident ? 1.0 : 4.0);
  const double cell = 300 + 150 * static_cast<double>(divide_up(int64_t{p.units} * p.tile, kThreads));
  const double barrier = p.exchange ? 2500 + 0.02 * p.depth * p.tile : 100;
  return static_cast<double>(divide_up(p.groups, at_once)) * (product + cell + barrier);
}

}  // namespace

RecurrencePlan plan_recurrence(const RecurrenceSizes& s, const GpuLimits& gpu) {
  std::optional<RecurrencePlan> best;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t tile : {8, 16, 32}) {
    if (tile > 8 && tile / 2 >= s.batch) break;
    for (int64_t split = 1; split <= std::min(gpu.multiprocessors, s.units); ++split) {
      const int64_t units = divide_up(s.units, split);
      if (divide_up(s.units, units) != split) continue;  // some blocks would own nothing
      auto plan = try_plan(s, gpu, tile, split, true);
      if (!plan) plan = try_plan(s, gpu, tile, split, false);
      if (!plan) continue;
      if (const double c = cost(*plan, s, gpu); c < least) {
        least = c;
        best = plan;
      }
    }
  }
  KRAIT_CHECK(best, "a recurrent layer of {} units in {} does not fit this GPU's {} bytes of shared memory; use "
              "smaller heads or bfloat16", s.units, s.dtype, gpu.shared);
  return *best;
}

}  // namespace krait::kernels::cuda

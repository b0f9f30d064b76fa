#include "kernels/cuda/draw_likeliest.h"

#include <algorithm>

#include "kernels/cuda/likeliest.cuh"
#include "kernels/cuda/overlap.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kMaxWarps = 32, kMaxEach = 2;
constexpr int kAtOnce = 9;  // keys of a row in a lane: 264 blocks of few_map leave as many

// A warp has kEach rows, kMaxWarps apart, whose keys are on their way together.
template <int kEach>
__global__ void __launch_bounds__(32 * kMaxWarps) draw_likeliest_kernel(const __grid_constant__ LikeliestDraw a) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  take_over();
  const int64_t at = __ldcg(a.step);
  int32_t position[kEach] = {};
  uint64_t best[kEach] = {};
#pragma unroll
  for (int r = 0; r < kEach; ++r)
    if (const int row = warp + r * kMaxWarps; row < a.rows) position[r] = __ldcg(a.position + row);
#pragma unroll 1
  for (int from = lane; from < a.parts; from += 32 * kAtOnce) {  // once, as a rule
    uint64_t key[kEach][kAtOnce];
#pragma unroll
    for (int r = 0; r < kEach; ++r)
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = warp + r * kMaxWarps, part = from + 32 * i;
        key[r][i] = row < a.rows && part < a.parts ? __ldcg(reinterpret_cast<const unsigned long long*>(a.likeliest) + int64_t{row} * a.parts + part) : 0;
      }
#pragma unroll
    for (int r = 0; r < kEach; ++r)
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) best[r] = max(best[r], key[r][i]);
  }
  __syncthreads();  // all have read the step
#pragma unroll
  for (int r = 0; r < kEach; ++r) {
    const int row = warp + r * kMaxWarps;
    const int64_t token = likeliest_index(likeliest_of_warp(best[r]));
    if (row >= a.rows || lane != 0) continue;
    a.last[row] = token;
    if (at < a.room) a.made[row * a.room + at] = token;
    a.position[row] = position[r] + 1;
    if (row == 0) *a.step = at + 1;
  }
}

}  // namespace

void draw_likeliest(const LikeliestDraw& a, Stream stream) {
  KRAIT_ASSERT(a.rows <= kMaxWarps * kMaxEach, "draw_likeliest of {} rows", a.rows);
  const auto kernel = a.rows <= kMaxWarps ? draw_likeliest_kernel<1> : draw_likeliest_kernel<kMaxEach>;
  keep_shared_memory(kernel);
  launch_overlapped(kernel, {.grid = 1, .block = 32 * std::min(a.rows, kMaxWarps), .stream = stream}, a);
}

}  // namespace krait::kernels::cuda

#include "kernels/cuda/few_draw.h"

#include "kernels/cuda/likeliest.cuh"
#include "kernels/cuda/overlap.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kAtOnce = 9;  // keys of a lane: 264 blocks of few_map leave as many a row

// A warp a row.
__global__ void few_draw_kernel(const __grid_constant__ FewDraw a) {
  const int row = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  take_over();
  const int64_t at = __ldcg(a.step);
  const int32_t position = __ldcg(a.position + row);
  uint64_t best = 0;
#pragma unroll 1
  for (int from = lane; from < a.parts; from += 32 * kAtOnce) {  // once, as a rule
    uint64_t key[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      key[i] = from + 32 * i < a.parts ? __ldcg(reinterpret_cast<const unsigned long long*>(a.likeliest) + int64_t{row} * a.parts + from + 32 * i) : 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) best = max(best, key[i]);
  }
  best = likeliest_of_warp(best);
  __syncthreads();  // all have read the step
  if (lane != 0) return;
  const int64_t token = likeliest_index(best);
  a.last[row] = token;
  if (at < a.room) a.made[row * a.room + at] = token;
  a.position[row] = position + 1;
  if (row == 0) *a.step = at + 1;
}

}  // namespace

void few_draw(const FewDraw& a, Stream stream) {
  launch_overlapped(few_draw_kernel, {.grid = 1, .block = 32 * a.rows, .stream = stream}, a);
}

bool are_logits_of(const bf16* y, int64_t rows, int64_t n, int64_t y_row, const Tensor& logits) {
  return logits.dtype() == DType::bf16 && logits.raw_data() == y && logits.size(0) == rows && logits.size(1) <= n && (rows == 1 || logits.stride(0) == y_row);
}

bool draws_from(const FewMap& map, const Tensor& logits) {
  return map.units == nullptr && map.total == nullptr && are_logits_of(map.y, map.rows, map.n, map.y_row, logits) && few_map_choosing_blocks(map) > 0;
}

void few_map_draw(FewMap map, bool early, Tensor& made, Tensor& last, Tensor& position, Tensor& step, const Tensor& logits, Stream stream) {
  const int64_t parts = few_map_choosing_blocks(map);
  const Tensor likeliest = empty({map.rows, parts}, DType::i64, logits.device());
  map.likeliest = reinterpret_cast<uint64_t*>(likeliest.data<int64_t>());
  map.choices = static_cast<int>(logits.size(1));
  few_map(map, early, stream);
  few_draw({map.likeliest, made.data<int64_t>(), last.data<int64_t>(), step.data<int64_t>(), position.data<int32_t>(), map.rows,
            static_cast<int>(parts), made.size(1)},
           stream);
}

}  // namespace krait::kernels::cuda

#include "kernels/cuda/rows_embedding.h"

#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/step_values.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kWide = 8;

// A block: one row. Bound by latency: the token, then its row.
__global__ void __launch_bounds__(kThreads) rows_embedding_kernel(const __grid_constant__ RowsEmbedding a) {
  __shared__ float parts[kWarps];
  const int64_t row = blockIdx.x;
  wait_for_previous();  // first: whoever reads ahead behind this kernel reads what those in front of it wrote
  let_next_begin();
  const int64_t token = __ldcg(a.tokens + row), place = a.places != nullptr ? __ldcg(a.positions + row) : 0;
  const bool inside = token >= 0 && token < a.v && (a.places == nullptr || (place >= 0 && place < a.p));
  float square = 0;
  for (int at = static_cast<int>(threadIdx.x) * kWide; at < a.d; at += kThreads * kWide) {
    const uint4 own = inside ? *reinterpret_cast<const uint4*>(a.table + token * a.d + at) : uint4{};
    const uint4 other = inside && a.places != nullptr ? *reinterpret_cast<const uint4*>(a.places + place * a.d + at) : uint4{};
    const uint32_t left[] = {own.x, own.y, own.z, own.w}, right[] = {other.x, other.y, other.z, other.w};
    uint32_t sum[4], product[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 l = two(left[i]), r = two(right[i]);
      sum[i] = !inside ? pack(nanf(""), nanf("")) : a.places != nullptr ? pack(l.x + r.x, l.y + r.y) : left[i];
      if (a.weight == nullptr) continue;
      const float2 u = two(sum[i]), w = *reinterpret_cast<const float2*>(a.weight + at + 2 * i);
      product[i] = pack(u.x * w.x, u.y * w.y);
      square += u.x * u.x + u.y * u.y;
    }
    *reinterpret_cast<uint4*>(a.y + row * a.d + at) = {sum[0], sum[1], sum[2], sum[3]};
    if (a.weight != nullptr) *reinterpret_cast<uint4*>(a.weighted + row * a.d + at) = {product[0], product[1], product[2], product[3]};
  }
  if (a.weight == nullptr) return;
  square = sum_lanes<32>(square);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = square;
  __syncthreads();
  if (threadIdx.x == 0) a.squares[row] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

}  // namespace

void rows_embedding(const RowsEmbedding& a, Stream stream) {
  launch_overlapped(rows_embedding_kernel, {.grid = a.rows, .block = kThreads, .stream = stream}, a);
}

}  // namespace krait::kernels::cuda

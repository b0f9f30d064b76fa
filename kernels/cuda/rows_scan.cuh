#pragma once
#include "kernels/cuda/copy_words.cuh"
#include "kernels/cuda/exp2.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/rows_scan.h"
#include "kernels/cuda/step_values.cuh"

namespace krait::kernels::cuda {

inline constexpr int kScanRows = 4, kScanGroups = 4, kScanPieces = kScanMaxRank / 16;  // pieces of 4 of d a lane

/// Lane i of four receives the sum of v[i] over the four.
__device__ __forceinline__ float sum_own(const float (&v)[4], int lane) {
  const bool high = lane & 2, odd = lane & 1;
  const float a = (high ? v[2] : v[0]) + __shfl_xor_sync(0xffffffffu, high ? v[0] : v[2], 2);
  const float b = (high ? v[3] : v[1]) + __shfl_xor_sync(0xffffffffu, high ? v[1] : v[3], 2);
  return (odd ? b : a) + __shfl_xor_sync(0xffffffffu, odd ? a : b, 1);
}

/// A block: kPasses kThreads / 4 channels of kScanRows rows; four lanes a channel, each four of its states; what belongs
/// to one row of a channel alone is done by one lane. Bound by reading and writing h, which comes into shared memory
/// before the kernel in front ends, as do the weights: a thread reads there what itself asked for.
template <int kThreads, int kPasses>
__global__ void __launch_bounds__(kThreads, 768 / kThreads) rows_scan_kernel(const __grid_constant__ RowsScan a) {
  static_assert(kScanRows == 4, "a lane a row");
  extern __shared__ __align__(16) float scan_shared[];
  constexpr int kEach = kThreads / 4;  // channels a pass
  const int outputs = a.r + 2 * kScanStates, tid = static_cast<int>(threadIdx.x), lane = tid % 4, pieces = a.r / 4;
  float4* const states = reinterpret_cast<float4*>(scan_shared);               // (kPasses, kScanRows, kThreads)
  float4* const logs = states + kPasses * kScanRows * kThreads;                // (kPasses, kThreads)
  uint2* const weights = reinterpret_cast<uint2*>(logs + kPasses * kThreads);  // (kPasses, kScanPieces, kThreads)
  float *const gathered = reinterpret_cast<float*>(weights + kPasses * kScanPieces * kThreads), *const values = gathered + kScanGroups * kScanRows * outputs;
  const int first = static_cast<int>(blockIdx.x) * kEach * kPasses + tid / 4, first_row = static_cast<int>(blockIdx.y) * kScanRows;
  const int count = min(kScanRows, a.rows - first_row);
  const int64_t row_states = int64_t{a.e} * kScanStates;

#pragma unroll 1
  for (int p = 0; p < kPasses; ++p) {
    const int c = first + p * kEach;
    if (c >= a.e) break;
    const int64_t at = int64_t{c} * kScanStates + 4 * lane;
    copy_async(logs + p * kThreads + tid, a.A_log + at, true);
#pragma unroll
    for (int i = 0; i < kScanRows; ++i)
      if (i < count) copy_async(states + (p * kScanRows + i) * kThreads + tid, a.h + (first_row + i) * row_states + at, true);
#pragma unroll
    for (int q = 0; q < kScanPieces; ++q)
      if (lane + 4 * q < pieces)
        copy_words<8>(weights + (p * kScanPieces + q) * kThreads + tid, a.dt_proj + int64_t{c} * a.r + 4 * (lane + 4 * q));
  }
  copy_commit();
  wait_for_previous();
  let_next_begin();

  bf16 own_x[kPasses], own_z[kPasses];
  float bias[kPasses], skip[kPasses];
  const int64_t own_row = first_row + lane;
#pragma unroll
  for (int p = 0; p < kPasses; ++p) {
    const int c = first + p * kEach;
    const bool alive = c < a.e && lane < count;
    own_x[p] = alive ? a.mixed[own_row * a.e + c] : bf16(0.0f);
    own_z[p] = alive ? a.xz[own_row * 2 * a.e + a.e + c] : bf16(0.0f);
    bias[p] = c < a.e ? a.dt_bias[c] : 0.0f;
    skip[p] = c < a.e ? a.D[c] : 0.0f;
  }
  const int quads = outputs / 4, items = kScanRows * quads, each = (a.projections + kScanGroups - 1) / kScanGroups;
#pragma unroll 1
  for (int at = tid; at < items * kScanGroups; at += kThreads) {
    const int item = at % items, group = at / items, row = item / quads, o = item % quads * 4;
    float4 s{};
    if (row < count) {
      const float* const from = a.projected + (first_row + row) * int64_t{a.projections} * outputs + o;
      const int end = min(a.projections, (group + 1) * each);
#pragma unroll 8
      for (int i = group * each; i < end; ++i) {
        const float4 v = *reinterpret_cast<const float4*>(from + int64_t{i} * outputs);
        s = {s.x + v.x, s.y + v.y, s.z + v.z, s.w + v.w};
      }
    }
    *reinterpret_cast<float4*>(gathered + group * kScanRows * outputs + 4 * item) = s;
  }
  __syncthreads();
#pragma unroll 1
  for (int at = tid; at < kScanRows * outputs; at += kThreads) {
    float s = 0;
#pragma unroll
    for (int i = 0; i < kScanGroups; ++i) s += gathered[i * kScanRows * outputs + at];
    values[at] = static_cast<float>(static_cast<bf16>(s));
  }
  copy_wait<0>();
  __syncthreads();
#pragma unroll 1
  for (int p = 0; p < kPasses; ++p) {
    const int c = first + p * kEach;
    const float4 log = logs[p * kThreads + tid];
    const float4 rate = {-kLog2e * __expf(log.x), -kLog2e * __expf(log.y), -kLog2e * __expf(log.z), -kLog2e * __expf(log.w)};
    float part[kScanRows] = {};
#pragma unroll 1
    for (int q = 0; lane + 4 * q < pieces; ++q) {
      const uint2 w = weights[(p * kScanPieces + q) * kThreads + tid];
      const float4 v = four(w);
#pragma unroll
      for (int i = 0; i < kScanRows; ++i) {
        const float4 d = *reinterpret_cast<const float4*>(values + i * outputs + 4 * (lane + 4 * q));
        part[i] += dot(v, d);
      }
    }
    const float dt = static_cast<float>(static_cast<bf16>(sum_own(part, lane))) + (kPasses == 1 || p == 0 ? bias[0] : bias[kPasses - 1]);
    const float delta = softplus_fast(dt), x = static_cast<float>(kPasses == 1 || p == 0 ? own_x[0] : own_x[kPasses - 1]), add = delta * x;
#pragma unroll
    for (int i = 0; i < kScanRows; ++i) {
      const int from = tid % 32 / 4 * 4 + i;
      const float own_delta = __shfl_sync(0xffffffffu, delta, from), own_add = __shfl_sync(0xffffffffu, add, from);
      const float4 B = *reinterpret_cast<const float4*>(values + i * outputs + a.r + 4 * lane);
      const float4 C = *reinterpret_cast<const float4*>(values + i * outputs + a.r + kScanStates + 4 * lane);
      float4 now = states[(p * kScanRows + i) * kThreads + tid];
      now.x = exp2f(own_delta * rate.x) * now.x + own_add * B.x;
      now.y = exp2f(own_delta * rate.y) * now.y + own_add * B.y;
      now.z = exp2f(own_delta * rate.z) * now.z + own_add * B.z;
      now.w = exp2f(own_delta * rate.w) * now.w + own_add * B.w;
      if (c < a.e && i < count) *reinterpret_cast<float4*>(a.h + (first_row + i) * row_states + int64_t{c} * kScanStates + 4 * lane) = now;
      part[i] = now.x * C.x + now.y * C.y + now.z * C.z + now.w * C.w;
    }
    const float sum = sum_own(part, lane), z = static_cast<float>(kPasses == 1 || p == 0 ? own_z[0] : own_z[kPasses - 1]);
    const float D = kPasses == 1 || p == 0 ? skip[0] : skip[kPasses - 1];
    if (c < a.e && lane < count) a.y[own_row * a.e + c] = static_cast<bf16>(__fdividef((sum + D * x) * z, 1.0f + __expf(-z)));
  }
}

template <int kThreads, int kPasses>
void start_rows_scan(const RowsScan& a, Stream stream) {
  static_assert(kPasses <= 2, "the last of a thread's values, or the first");
  const int outputs = a.r + 2 * kScanStates;
  keep_shared_memory(rows_scan_kernel<kThreads, kPasses>);
  launch_overlapped(rows_scan_kernel<kThreads, kPasses>,
                    {.grid = ceil_div(a.e, kThreads / 4 * kPasses), .grid_y = ceil_div(a.rows, kScanRows), .block = kThreads,
                     .shared = int64_t{kPasses} * kThreads * (16 * kScanRows + 16 + 8 * kScanPieces) + int64_t{4} * (kScanGroups + 1) * kScanRows * outputs,
                     .stream = stream},
                    a);
}

}  // namespace krait::kernels::cuda

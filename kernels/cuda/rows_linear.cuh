#pragma once
#include "kernels/cuda/copy_words.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/rows_linear.h"
#include "kernels/cuda/step_values.cuh"
#include "kernels/cuda/tma.cuh"

namespace krait::kernels::cuda {

inline constexpr int kRowsTaps = 4;

__device__ __forceinline__ uint4 read_or_zero(const bf16* p, bool inside) {
  return inside ? *reinterpret_cast<const uint4*>(p) : uint4{0, 0, 0, 0};
}
/// The part of a row's squares that lane i of kScaleLanes adds.
inline constexpr int kScaleLanes = 8;
__device__ __forceinline__ float squares_of_lane(const RowScale& s, int64_t row, int lane) {
  const float* const from = s.squares + row * s.parts;
  float sum = 0;
  if (s.parts % 4 == 0) {
#pragma unroll 1
    for (int i = 4 * lane; i < s.parts; i += 4 * kScaleLanes) {
      const float4 v = *reinterpret_cast<const float4*>(from + i);
      sum += (v.x + v.y) + (v.z + v.w);
    }
  } else {
#pragma unroll 1
    for (int i = lane; i < s.parts; i += kScaleLanes) sum += from[i];
  }
  return sum;
}
/// The row's factor, to all of these lanes.
__device__ __forceinline__ float factor_of_row(const RowScale& s, float sum, int k) {
  sum = sum_lanes<kScaleLanes>(sum);
  return rsqrtf(sum / static_cast<float>(k) + s.eps);
}

/// A block: 16 kM rows by 8 kN columns of y; its warps take pieces of 32 of k in turn, kSteps at a time, and are added in
/// order. Which value of k sits where in a product does not matter as long as both operands agree: a lane reads 8
/// neighbours of its rows, and of the weights, which wait in shared memory when the kernel in front ends: the block's
/// columns come as two halves, so that neighbours of a product, one of each half, lie in different banks. Once a launch
/// every instruction comes from the L2 cache: loops that need no registers by name stay loops.
template <int kM, int kN, int kWarps, int kSteps>
struct RowsTile {
  static constexpr int kThreads = 32 * kWarps, kRows = 16 * kM, kColumns = 8 * kN;
  static constexpr int kSpan = 32 * kWarps * kSteps;  // of k at a time
  static constexpr int kHalf = kColumns / 2;
  static constexpr int kPitch = kColumns % 16 == 8 ? kColumns : kColumns + 8;  // of mixed values: different banks
  static constexpr int kSumPitch = (kColumns + 3) / 8 * 8 + 4;                 // of sums: rows in different banks
  static constexpr int kRowLanes = kColumns <= 32 ? 16 : 32;                   // neighbours that finish a row with its squares
  /// Neighbours in a column's row that a thread finishes, two columns each: a row by kRowLanes threads, or (convolved) all
  /// in turn.
  static constexpr int pairs(bool convolves) { return (convolves ? kRows * kColumns / 2 + kThreads - 1 : kRows * kRowLanes) / kThreads; }
  /// Bytes in front of the second half of the weights: an odd multiple of 64.
  static constexpr int second_half(int k) { return kHalf * k * 2 + (kHalf * k * 2 % 128 == 0 ? 64 : 0); }
  static constexpr int64_t front_bytes(int k) {
    const int64_t sums = int64_t{kWarps} * kRows * kSumPitch * 4, weights = second_half(k) + int64_t{kHalf} * k * 2;
    return weights > sums ? weights : sums;
  }
  /// Weights, later sums; a pair's past; the columns' filters and biases; mixed values; the columns of `project`.
  static constexpr int64_t shared_bytes(int k, bool convolves, int outputs) {
    return front_bytes(k) +
           (convolves ? int64_t{pairs(true)} * kThreads * 4 * (kRowsTaps - 1) + kColumns / 2 * 20 + int64_t{2} * (kRows + outputs) * kPitch : 0);
  }
};

template <int kM, int kN, int kWarps, int kSteps, bool kConvolves>
__global__ void __launch_bounds__(32 * kWarps, 512 / (32 * kWarps)) rows_linear_kernel(const __grid_constant__ RowsLinear a) {
  using Tile = RowsTile<kM, kN, kWarps, kSteps>;
  constexpr int kThreads = Tile::kThreads, kRows = Tile::kRows, kColumns = Tile::kColumns, kPitch = Tile::kPitch;
  constexpr int kHalf = Tile::kHalf, kSumPitch = Tile::kSumPitch;
  constexpr int kPairs = Tile::pairs(kConvolves);
  static_assert(kRows * kScaleLanes <= kThreads, "a thread a share of a row's squares");
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float factor[kRows];
  float* const sums = reinterpret_cast<float*>(shared);                              // (kWarps, kRows, kSumPitch)
  uint4* const taps = reinterpret_cast<uint4*>(shared + Tile::front_bytes(a.k));     // (kColumns / 2)
  uint32_t* const bias = reinterpret_cast<uint32_t*>(taps + kColumns / 2);           // (kColumns / 2), of the convolution
  uint32_t* const past = bias + kColumns / 2;                                        // (kPairs, kRowsTaps - 1, kThreads)
  bf16* const tile = reinterpret_cast<bf16*>(past + kPairs * (kRowsTaps - 1) * kThreads);  // (kRows, kPitch)
  bf16* const project = tile + kRows * kPitch;                                       // (outputs, kPitch)
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int first = static_cast<int>(blockIdx.x) * kColumns, first_row = static_cast<int>(blockIdx.y) * kRows;
  const int steps = (a.k + 32 * kWarps - 1) / (32 * kWarps), channels = a.conv_end - a.conv_begin;
  const int second_half = Tile::second_half(a.k);
  const bool projects_any = kConvolves && a.part != nullptr, projects = projects_any && first < a.conv_end;
  // Row and columns, within the block, of this thread's q-th pair.
  const auto row_of = [&](int q) { return kConvolves ? (tid + q * kThreads) / (kColumns / 2) : (tid + q * kThreads) / Tile::kRowLanes; };
  const auto column_of = [&](int q) { return 2 * (kConvolves ? (tid + q * kThreads) % (kColumns / 2) : tid % Tile::kRowLanes); };
  const auto convolved = [&](int column) { return first + column >= a.conv_begin && first + column < min(a.n, a.conv_end); };

  const int columns = min(kColumns, a.n - first);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __shared__ uint64_t arrived;  // of the weights
  if (tid == 0) {
    const uint32_t barrier = shared_address(&arrived);
    barrier_init(barrier, 1);
    barriers_visible();
    barrier_expect(barrier, columns * a.k * 2);
    const bf16* const from = a.w + int64_t{first} * a.k;
    bring_bytes(shared_address(shared), from, min(columns, kHalf) * a.k * 2, barrier);
    if (columns > kHalf) bring_bytes(shared_address(shared + second_half), from + kHalf * a.k, (columns - kHalf) * a.k * 2, barrier);
  }
#else
#pragma unroll 1
  for (int i = tid; i < columns * (a.k / 8); i += kThreads)
    copy_async(shared + (i < kHalf * (a.k / 8) ? 0 : second_half - kHalf * a.k * 2) + 16 * i, a.w + int64_t{first} * a.k + int64_t{8} * i, true);
#endif
  if constexpr (kConvolves) {
    if (tid < kColumns / 2 && convolved(2 * tid)) {
      const int channel = first + 2 * tid - a.conv_begin;
      copy_async(taps + tid, a.conv_weight + kRowsTaps * channel, true);
      if (a.conv_bias != nullptr) copy_words<4>(bias + tid, a.conv_bias + channel);
    }
#pragma unroll 1
    for (int q = 0; q < kPairs; ++q) {
      const int row = first_row + row_of(q), column = column_of(q);
      if (!convolved(column) || row_of(q) >= kRows || row >= a.rows) continue;
      const bf16* const from = a.conv + int64_t{row} * (kRowsTaps - 1) * channels + first + column - a.conv_begin;
#pragma unroll
      for (int j = 0; j + 1 < kRowsTaps; ++j) copy_words<4>(past + (q * (kRowsTaps - 1) + j) * kThreads + tid, from + int64_t{j} * channels);
    }
    if (projects)
#pragma unroll 1
      for (int i = tid; i < a.outputs * (kColumns / 8); i += kThreads) {
        const int output = i / (kColumns / 8), c = i % (kColumns / 8) * 8;
        copy_async(project + output * kPitch + c, a.project + int64_t{output} * channels + first + c, true);
      }
  }
  copy_commit();
  __syncthreads();  // the barrier is there
  wait_for_previous();
  if (!projects_any) let_next_begin();

  uint32_t residual = 0;  // of pair 0
  float2 weight{};
  const bool in_columns = column_of(0) < kColumns && first + column_of(0) < a.n;  // without a convolution that of all pairs
  if (!kConvolves && a.residual != nullptr && in_columns && first_row + row_of(0) < a.rows) {
    residual = *reinterpret_cast<const uint32_t*>(a.residual + int64_t{first_row + row_of(0)} * a.n + first + column_of(0));
    weight = *reinterpret_cast<const float2*>(a.weight + first + column_of(0));
  }
  float acc[kM][kN][4] = {}, square_sum = 0;
#pragma unroll 1
  for (int base = 0; base < steps; base += kSteps) {
    uint4 x[kSteps][2 * kM];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int at = ((base + s) * kWarps + warp) * 32 + 8 * t;
#pragma unroll
      for (int i = 0; i < 2 * kM; ++i) {
        const int row = first_row + 8 * i + g;
        x[s][i] = read_or_zero(a.x + row * a.x_row + at, row < a.rows && at < a.k);
      }
    }
    if (base == 0) {
      if (a.scale.squares != nullptr && tid < kRows * kScaleLanes)
        square_sum = squares_of_lane(a.scale, min(first_row + tid / kScaleLanes, a.rows - 1), tid % kScaleLanes);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      barrier_wait(shared_address(&arrived), 0);
#else
      copy_wait<0>();
      __syncthreads();
#endif
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int piece = (base + s) * kWarps + warp;
      if (piece * 32 >= a.k) break;
      const unsigned char* const from = shared + g % 2 * second_half + g / 2 * a.k * 2 + piece * 64 + 16 * t;
      uint4 v[kN];
#pragma unroll
      for (int j = 0; j < kN; ++j) v[j] = *reinterpret_cast<const uint4*>(from + 4 * j * a.k * 2);
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int m = 0; m < kM; ++m) mma(acc[m][j], {x[s][2 * m].x, x[s][2 * m + 1].x, x[s][2 * m].y, x[s][2 * m + 1].y}, v[j].x, v[j].y);
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int m = 0; m < kM; ++m) mma(acc[m][j], {x[s][2 * m].z, x[s][2 * m + 1].z, x[s][2 * m].w, x[s][2 * m + 1].w}, v[j].z, v[j].w);
    }
  }
  if (a.scale.squares != nullptr) {
    const float f = factor_of_row(a.scale, square_sum, a.k);
    if (tid < kRows * kScaleLanes && tid % kScaleLanes == 0) factor[tid / kScaleLanes] = f;
  }
  if (projects_any) let_next_begin();  // not before: the states that it brings would stand in front of x
  copy_wait<0>();
  __syncthreads();  // the weights have been read; what was copied is there
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[(warp * kRows + 16 * m + i / 2 * 8 + g) * kSumPitch + i % 2 * kHalf + 4 * j + t] = acc[m][j][i];
  __syncthreads();

#pragma unroll 1
  for (int q = 0; q < kPairs; ++q) {
    const int local = row_of(q), column = column_of(q), at = first + column;
    const int64_t row = first_row + local;
    const bool alive = column < kColumns && at < a.n && local < kRows && row < a.rows;
    float square = 0;
    if (alive) {
      float2 s = {0, 0};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float2 v = *reinterpret_cast<const float2*>(sums + (w * kRows + local) * kSumPitch + column);
        s.x += v.x;
        s.y += v.y;
      }
      if (a.scale.squares != nullptr) s = {s.x * factor[local], s.y * factor[local]};
      if (a.bias != nullptr) {
        const float2 b = two(*reinterpret_cast<const uint32_t*>(a.bias + at));
        s = {s.x + b.x, s.y + b.y};
      }
      if (a.epilogue != Epilogue::none) s = {activate_as(a.epilogue, s.x), activate_as(a.epilogue, s.y)};
      const uint32_t made = pack(s.x, s.y);
      *reinterpret_cast<uint32_t*>(a.y + row * a.y_row + at) = made;
      if (!kConvolves && a.residual != nullptr) {
        if (q > 0) residual = *reinterpret_cast<const uint32_t*>(a.residual + row * a.n + at);
        const float2 v = two(made), r = two(residual);
        const uint32_t sum = pack(v.x + r.x, v.y + r.y);
        const float2 u = two(sum);
        *reinterpret_cast<uint32_t*>(a.sum + row * a.n + at) = sum;
        *reinterpret_cast<uint32_t*>(a.weighted + row * a.n + at) = pack(u.x * weight.x, u.y * weight.y);
        square = u.x * u.x + u.y * u.y;
      }
      if (kConvolves && convolved(column)) {
        const uint32_t* const slots = past + q * (kRowsTaps - 1) * kThreads + tid;
        const uint4 filter = taps[column / 2];
        const uint32_t past1 = slots[kThreads], past2 = slots[2 * kThreads];
        float2 p = a.conv_bias != nullptr ? two(bias[column / 2]) : float2{0, 0};
        const float2 w01 = two(filter.x), w23 = two(filter.y), v01 = two(filter.z), v23 = two(filter.w);
        const float2 x0 = two(slots[0]), x1 = two(past1), x2 = two(past2), x3 = two(made);
        p.x += w01.x * x0.x + w01.y * x1.x + w23.x * x2.x + w23.y * x3.x;
        p.y += v01.x * x0.y + v01.y * x1.y + v23.x * x2.y + v23.y * x3.y;
        const uint32_t mixed = pack(silu_fast(p.x), silu_fast(p.y));
        const int channel = at - a.conv_begin;
        bf16* const state = a.conv + row * (kRowsTaps - 1) * channels + channel;
        *reinterpret_cast<uint32_t*>(state) = past1;
        *reinterpret_cast<uint32_t*>(state + channels) = past2;
        *reinterpret_cast<uint32_t*>(state + 2 * int64_t{channels}) = made;
        *reinterpret_cast<uint32_t*>(a.mixed + row * channels + channel) = mixed;
        *reinterpret_cast<uint32_t*>(tile + local * kPitch + column) = mixed;
      }
    }
    if (!kConvolves && a.residual != nullptr) {  // the same for the whole block
      square = sum_lanes<Tile::kRowLanes>(square);
      if (column == 0 && row < a.rows) a.squares[row * gridDim.x + blockIdx.x] = square;
    }
  }
  if (kConvolves && projects) {
    __syncthreads();
#pragma unroll 1
    for (int job = warp; job < (a.outputs + 7) / 8 * kM; job += kWarps) {
      const int output = job / kM * 8, m = job % kM;
      const bf16 *const left = tile + (16 * m + g) * kPitch + 2 * t, *const right = project + min(output + g, a.outputs - 1) * kPitch + 2 * t;
      float d[4] = {};
#pragma unroll
      for (int s = 0; s < kColumns / 16; ++s) {
        uint32_t f[4], b[2];
#pragma unroll
        for (int i = 0; i < 4; ++i) f[i] = *reinterpret_cast<const uint32_t*>(left + i % 2 * 8 * kPitch + 16 * s + i / 2 * 8);
#pragma unroll
        for (int i = 0; i < 2; ++i) b[i] = *reinterpret_cast<const uint32_t*>(right + 16 * s + 8 * i);
        mma(d, f, b[0], b[1]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (const int row = first_row + 16 * m + 8 * half + g; row < a.rows && output + 2 * t < a.outputs)
          *reinterpret_cast<float2*>(a.part + (int64_t{row} * (channels / kColumns) + blockIdx.x) * a.outputs + output + 2 * t) = {
              d[2 * half], d[2 * half + 1]};
    }
    return;
  }
  if (a.scale.squares == nullptr) return;
  // The scaled rows themselves, shared by the blocks that have nothing more to do.
  const int idle = a.part != nullptr ? a.conv_end / kColumns : 0, sharers = static_cast<int>(gridDim.x) - idle, mine = static_cast<int>(blockIdx.x) - idle;
  const int width = (a.k + sharers - 1) / sharers, begin = mine * width, end = min(a.k, begin + width);
#pragma unroll 1
  for (int c = begin + lane; c < end; c += 32) {
    bf16 v[kRows / kWarps];
#pragma unroll
    for (int i = 0; i < kRows / kWarps; ++i) v[i] = a.x[min(first_row + warp + i * kWarps, a.rows - 1) * a.x_row + c];
#pragma unroll
    for (int i = 0; i < kRows / kWarps; ++i)
      if (const int local = warp + i * kWarps; first_row + local < a.rows)
        a.scale.normed[int64_t{first_row + local} * a.k + c] = static_cast<bf16>(static_cast<float>(v[i]) * factor[local]);
  }
  if (mine == 0 && a.scale.rstd != nullptr && tid < kRows && first_row + tid < a.rows) a.scale.rstd[first_row + tid] = factor[tid];
}

template <int kM, int kN, int kWarps, int kSteps, bool kConvolves>
void start_rows_linear(const RowsLinear& a, Stream stream) {
  using Tile = RowsTile<kM, kN, kWarps, kSteps>;
  keep_shared_memory(rows_linear_kernel<kM, kN, kWarps, kSteps, kConvolves>);
  launch_overlapped(rows_linear_kernel<kM, kN, kWarps, kSteps, kConvolves>,
                    {.grid = ceil_div(a.n, Tile::kColumns), .grid_y = ceil_div(a.rows, Tile::kRows), .block = Tile::kThreads,
                     .shared = Tile::shared_bytes(a.k, kConvolves, a.part != nullptr ? a.outputs : 0), .stream = stream},
                    a);
}

}  // namespace krait::kernels::cuda

#pragma once
#include "kernels/cuda/copy_words.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/rows_linear.h"
#include "kernels/cuda/rows_project.cuh"
#include "kernels/cuda/step_values.cuh"

namespace krait::kernels::cuda {

inline constexpr int kRowsTaps = 4;

__device__ __forceinline__ uint4 read_or_zero(const bf16* p, bool inside) {
  return inside ? *reinterpret_cast<const uint4*>(p) : uint4{0, 0, 0, 0};
}

/// A row's factor; a warp together.
__device__ __forceinline__ float factor_of_row(const RowScale& s, int64_t row, int k) {
  float square = 0;
  for (int i = static_cast<int>(threadIdx.x) % 32; i < s.parts; i += 32) square += s.squares[row * s.parts + i];
  return rsqrtf(sum_lanes<32>(square) / static_cast<float>(k) + s.eps);
}

/// What stands behind a map, as far as it makes another kernel.
enum class RowsForm { plain, convolved, gated };

/// A block: 16 kM rows by 8 kN columns of y; its warps take pieces of 32 of k in turn, kSteps at a time, and are added in
/// order. Which value of k sits where in a product does not matter as long as both operands agree: a lane reads 8
/// neighbours of its rows, and of the weights what itself multiplies, which wait in shared memory when the kernel in
/// front ends. Once a launch every instruction comes from the L2 cache: loops that need no registers by name stay loops.
template <int kM, int kN, int kWarps, int kSteps>
struct RowsTile {
  static constexpr int kThreads = 32 * kWarps, kRows = 16 * kM, kColumns = 8 * kN;
  static constexpr int kSpan = 32 * kWarps * kSteps;  // of k at a time
  static constexpr int kPitch = kColumns % 16 == 8 ? kColumns : kColumns + 8;  // of sums and of mixed values: different banks
  static constexpr int kRowLanes = kColumns <= 32 ? 16 : 32;                   // neighbours that finish a row, two columns each
  static constexpr int kPairs = kRows * kRowLanes / kThreads;
  static constexpr int64_t weight_bytes(int k) { return int64_t{(k + 32 * kWarps - 1) / (32 * kWarps)} * kN * kThreads * 16; }
  static constexpr int64_t front_bytes(int k) {
    const int64_t sums = int64_t{kWarps} * kRows * kPitch * 4;
    return weight_bytes(k) > sums ? weight_bytes(k) : sums;
  }
  /// Rows' factors; weights, later sums; a pair's filter, past and bias; mixed values; the columns of `project`.
  static constexpr int64_t shared_bytes(int k, bool convolves, int outputs) {
    return kRows * 4 + front_bytes(k) + (convolves ? int64_t{kPairs} * kThreads * (16 + 4 * kRowsTaps) + int64_t{2} * (kRows + outputs) * kPitch : 0);
  }
};

template <int kM, int kN, int kWarps, int kSteps, RowsForm kForm>
__global__ void __launch_bounds__(32 * kWarps, 512 / (32 * kWarps)) rows_linear_kernel(const __grid_constant__ RowsLinear a) {
  using Tile = RowsTile<kM, kN, kWarps, kSteps>;
  constexpr bool kConvolves = kForm == RowsForm::convolved, kGated = kForm == RowsForm::gated;
  static_assert(!kGated || kN % 2 == 0);
  constexpr int kThreads = Tile::kThreads, kRows = Tile::kRows, kColumns = Tile::kColumns, kPitch = Tile::kPitch, kPairs = Tile::kPairs;
  extern __shared__ __align__(16) unsigned char shared[];
  float* const factor = reinterpret_cast<float*>(shared);                           // (kRows)
  unsigned char* const front = shared + sizeof(float) * kRows;
  uint4* const weights = reinterpret_cast<uint4*>(front);                           // (steps, kN, kThreads)
  float* const sums = reinterpret_cast<float*>(front);                              // (kWarps, kRows, kPitch)
  uint4* const taps = reinterpret_cast<uint4*>(front + Tile::front_bytes(a.k));     // (kPairs, kThreads)
  uint32_t* const past = reinterpret_cast<uint32_t*>(taps + kPairs * kThreads);     // (kPairs, kRowsTaps, kThreads)
  bf16* const tile = reinterpret_cast<bf16*>(past + kPairs * kRowsTaps * kThreads);  // (kRows, kPitch)
  bf16* const project = tile + kRows * kPitch;                                       // (outputs, kPitch)
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  // Gated: half of the columns are gates, half the units behind them, of which a pair takes both.
  constexpr int kOwn = kGated ? kColumns / 2 : kColumns;
  const int own_n = kGated ? a.n / 2 : a.n;
  const int first = static_cast<int>(blockIdx.x) * kOwn, first_row = static_cast<int>(blockIdx.y) * kRows;
  const int steps = (a.k + 32 * kWarps - 1) / (32 * kWarps), channels = a.conv_end - a.conv_begin;
  const int pair_row = tid / Tile::kRowLanes, pair_column = tid % Tile::kRowLanes * 2;  // of pair 0; the others further down
  constexpr int kRowsOfPair = kThreads / Tile::kRowLanes;
  const bool in_columns = pair_column < kOwn && first + pair_column < own_n;
  const bool projects = kConvolves && a.part != nullptr && first < a.conv_end;
  const int channel = first + pair_column - a.conv_begin;
  const bool convolved = kConvolves && in_columns && channel >= 0 && channel < channels;

#pragma unroll 1
  for (int s = 0; s < steps; ++s) {
    const int at = (s * kWarps + warp) * 32 + 8 * t;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const bool up = kGated && j >= kN / 2;
      const int own = first + 8 * (up ? j - kN / 2 : j) + g, column = up ? own + own_n : own;
      const bool inside = at < a.k && own < own_n;
      copy_async(weights + (s * kN + j) * kThreads + tid, a.w + (inside ? int64_t{column} * a.k + at : 0), inside);
    }
  }
  if constexpr (kConvolves) {
#pragma unroll 1
    for (int q = 0; q < kPairs; ++q) {
      const int row = first_row + pair_row + q * kRowsOfPair;
      if (!convolved || row >= a.rows) continue;
      uint32_t* const slots = past + q * kRowsTaps * kThreads + tid;
      const bf16* const from = a.conv + int64_t{row} * (kRowsTaps - 1) * channels + channel;
      copy_async(taps + q * kThreads + tid, a.conv_weight + kRowsTaps * channel, true);
#pragma unroll
      for (int j = 0; j + 1 < kRowsTaps; ++j) copy_words<4>(slots + j * kThreads, from + int64_t{j} * channels);
      if (a.conv_bias != nullptr) copy_words<4>(slots + (kRowsTaps - 1) * kThreads, a.conv_bias + channel);
    }
    if (projects)
#pragma unroll 1
      for (int i = tid; i < a.outputs * (kColumns / 8); i += kThreads) {
        const int output = i / (kColumns / 8), c = i % (kColumns / 8) * 8;
        copy_async(project + output * kPitch + c, a.project + int64_t{output} * channels + first + c, true);
      }
  }
  copy_commit();
  wait_for_previous();
  let_next_begin();

  uint32_t residual = 0;  // of pair 0
  float2 weight{};
  if (a.residual != nullptr && in_columns && first_row + pair_row < a.rows) {
    residual = *reinterpret_cast<const uint32_t*>(a.residual + int64_t{first_row + pair_row} * a.n + first + pair_column);
    weight = *reinterpret_cast<const float2*>(a.weight + first + pair_column);
  }
  float acc[kM][kN][4] = {};
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
      if (a.scale.squares != nullptr)
#pragma unroll
        for (int i = 0; i < kRows / kWarps; ++i) {
          const float f = factor_of_row(a.scale, min(first_row + warp + i * kWarps, a.rows - 1), a.k);
          if (lane == 0) factor[warp + i * kWarps] = f;
        }
      copy_wait<0>();
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (base + s >= steps) break;
      const uint4* const from = weights + (base + s) * kN * kThreads + tid;
      uint4 v[kN];
#pragma unroll
      for (int j = 0; j < kN; ++j) v[j] = from[j * kThreads];
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
  __syncthreads();  // the weights have been read
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2*>(sums + (warp * kRows + 16 * m + 8 * half + g) * kPitch + 8 * j + 2 * t) = {acc[m][j][2 * half], acc[m][j][2 * half + 1]};
  __syncthreads();

#pragma unroll 1
  for (int q = 0; q < kPairs; ++q) {
    const int local = pair_row + q * kRowsOfPair, at = first + pair_column;
    const int64_t row = first_row + local;
    const bool alive = in_columns && row < a.rows;
    float square = 0;
    if (alive) {
      float2 s = {0, 0};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float2 v = *reinterpret_cast<const float2*>(sums + (w * kRows + local) * kPitch + pair_column);
        s.x += v.x;
        s.y += v.y;
      }
      if (a.scale.squares != nullptr) s = {s.x * factor[local], s.y * factor[local]};
      if constexpr (kGated) {
        float2 up = {0, 0};
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const float2 v = *reinterpret_cast<const float2*>(sums + (w * kRows + local) * kPitch + kOwn + pair_column);
          up.x += v.x;
          up.y += v.y;
        }
        if (a.scale.squares != nullptr) up = {up.x * factor[local], up.y * factor[local]};
        const uint32_t gates = pack(s.x, s.y), ups = pack(up.x, up.y);
        *reinterpret_cast<uint32_t*>(a.y + row * a.y_row + at) = gates;
        *reinterpret_cast<uint32_t*>(a.y + row * a.y_row + own_n + at) = ups;
        const float2 z = two(gates), u = two(ups);
        *reinterpret_cast<uint32_t*>(a.units + row * own_n + at) = pack(silu_fast(z.x) * u.x, silu_fast(z.y) * u.y);
        continue;  // nothing of what follows stands behind gated units
      }
      if (a.bias != nullptr) {
        const float2 b = two(*reinterpret_cast<const uint32_t*>(a.bias + at));
        s = {s.x + b.x, s.y + b.y};
      }
      if (a.epilogue != Epilogue::none) s = {activate_as(a.epilogue, s.x), activate_as(a.epilogue, s.y)};
      const uint32_t made = pack(s.x, s.y);
      *reinterpret_cast<uint32_t*>(a.y + row * a.y_row + at) = made;
      if (a.residual != nullptr) {
        if (q > 0) residual = *reinterpret_cast<const uint32_t*>(a.residual + row * a.n + at);
        const float2 v = two(made), r = two(residual);
        const uint32_t sum = pack(v.x + r.x, v.y + r.y);
        const float2 u = two(sum);
        *reinterpret_cast<uint32_t*>(a.sum + row * a.n + at) = sum;
        *reinterpret_cast<uint32_t*>(a.weighted + row * a.n + at) = pack(u.x * weight.x, u.y * weight.y);
        square = u.x * u.x + u.y * u.y;
      }
      if (convolved) {
        const uint32_t* const slots = past + q * kRowsTaps * kThreads + tid;
        const uint4 filter = taps[q * kThreads + tid];
        const uint32_t past1 = slots[kThreads], past2 = slots[2 * kThreads];
        float2 p = a.conv_bias != nullptr ? two(slots[3 * kThreads]) : float2{0, 0};
        const float2 w01 = two(filter.x), w23 = two(filter.y), v01 = two(filter.z), v23 = two(filter.w);
        const float2 x0 = two(slots[0]), x1 = two(past1), x2 = two(past2), x3 = two(made);
        p.x += w01.x * x0.x + w01.y * x1.x + w23.x * x2.x + w23.y * x3.x;
        p.y += v01.x * x0.y + v01.y * x1.y + v23.x * x2.y + v23.y * x3.y;
        const uint32_t mixed = pack(silu_fast(p.x), silu_fast(p.y));
        bf16* const state = a.conv + row * (kRowsTaps - 1) * channels + channel;
        *reinterpret_cast<uint32_t*>(state) = past1;
        *reinterpret_cast<uint32_t*>(state + channels) = past2;
        *reinterpret_cast<uint32_t*>(state + 2 * int64_t{channels}) = made;
        *reinterpret_cast<uint32_t*>(a.mixed + row * channels + channel) = mixed;
        *reinterpret_cast<uint32_t*>(tile + local * kPitch + pair_column) = mixed;
      }
    }
    if (a.residual != nullptr) {  // the same for the whole block
      square = sum_lanes<Tile::kRowLanes>(square);
      if (pair_column == 0 && row < a.rows) a.squares[row * gridDim.x + blockIdx.x] = square;
    }
  }
  if (kConvolves && projects) {
    __syncthreads();
#pragma unroll 1
    for (int job = warp; job < (a.outputs + 7) / 8 * kM; job += kWarps) {
      const int output = job / kM * 8, m = job % kM;
      const bf16 *const left = tile + (16 * m + g) * kPitch + 2 * t, *const right = project + min(output + g, a.outputs - 1) * kPitch + 2 * t;
      float d[4] = {};
      project_tile<kColumns / 16>(d, left, right, kPitch);
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

template <int kM, int kN, int kWarps, int kSteps, RowsForm kForm>
void start_rows_linear(const RowsLinear& a, Stream stream) {
  using Tile = RowsTile<kM, kN, kWarps, kSteps>;
  keep_shared_memory(rows_linear_kernel<kM, kN, kWarps, kSteps, kForm>);
  launch_overlapped(rows_linear_kernel<kM, kN, kWarps, kSteps, kForm>,
                    {.grid = ceil_div(a.n, Tile::kColumns), .grid_y = ceil_div(a.rows, Tile::kRows), .block = Tile::kThreads,
                     .shared = Tile::shared_bytes(a.k, kForm == RowsForm::convolved, a.part != nullptr ? a.outputs : 0), .stream = stream},
                    a);
}

}  // namespace krait::kernels::cuda

#pragma once
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/rows_linear.h"

namespace krait::kernels::cuda {

inline constexpr int kRowsTaps = 4;

__device__ __forceinline__ float2 two_of(uint32_t v) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&v));
}
__device__ __forceinline__ float silu_of_row(float v) { return __fdividef(v, 1.0f + __expf(-v)); }
__device__ __forceinline__ float factor_of(const RowScale& s, float square, int k) { return rsqrtf(square / static_cast<float>(k) + s.eps); }
__device__ __forceinline__ void unpack(float (&v)[8], uint4 words) {
  const uint32_t of[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = two_of(of[i]);
    v[2 * i] = pair.x;
    v[2 * i + 1] = pair.y;
  }
}
__device__ __forceinline__ uint4 packed(const float (&v)[8]) { return {pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7])}; }

/// A block: 16 kM rows by 8 kN columns of y; its warps take pieces of 32 of k in turn, kSteps at a time, and are added in
/// order. Which value of k sits where in a product does not matter as long as both operands agree: a lane reads 8
/// neighbours of its rows, and of the weights what itself multiplies, which wait in shared memory when the kernel in
/// front ends. Once a launch every instruction comes from the L2 cache: loops that need no registers by name stay loops.
template <int kM, int kN, int kWarps, int kSteps>
struct RowsTile {
  static constexpr int kThreads = 32 * kWarps, kRows = 16 * kM, kColumns = 8 * kN;
  static constexpr int kPitch = kColumns % 16 == 8 ? kColumns : kColumns + 8;  // of sums: different banks
  static constexpr int kTilePitch = kColumns + 8;             // of mixed values and of `project`
  static constexpr int kPartLanes = kThreads / kRows;         // neighbours that add a row's squares
  static constexpr int kRowLanes = kColumns <= 32 ? 16 : 32;  // neighbours that finish a row without a convolution, two columns each
  static constexpr int64_t weight_bytes(int k) { return int64_t{(k + 32 * kWarps - 1) / (32 * kWarps)} * kN * kThreads * 16; }
  static constexpr int64_t front_bytes(int k) {
    const int64_t sums = int64_t{kWarps} * kRows * kPitch * 4;
    return weight_bytes(k) > sums ? weight_bytes(k) : sums;
  }
  /// Weights, later sums; past values, filters and bias of the convolution; mixed values; the columns of `project`.
  static constexpr int64_t shared_bytes(int k, bool convolves, int outputs) {
    return front_bytes(k) + (convolves ? int64_t{2} * ((kRows * (kRowsTaps - 1) + kRowsTaps + 1) * kColumns + (kRows + outputs) * kTilePitch) : 0);
  }
};

template <int kM, int kN, int kWarps, int kSteps, bool kConvolves>
__global__ void __launch_bounds__(32 * kWarps, 512 / (32 * kWarps)) rows_linear_kernel(const __grid_constant__ RowsLinear a) {
  using Tile = RowsTile<kM, kN, kWarps, kSteps>;
  constexpr int kThreads = Tile::kThreads, kRows = Tile::kRows, kColumns = Tile::kColumns, kPitch = Tile::kPitch, kTilePitch = Tile::kTilePitch;
  constexpr int kOwnRows = kRows / kWarps;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float factor[kRows];
  uint4* const weights = reinterpret_cast<uint4*>(shared);                   // (steps, kN, kThreads)
  float* const sums = reinterpret_cast<float*>(shared);                      // (kWarps, kRows, kPitch)
  bf16* const past = reinterpret_cast<bf16*>(shared + Tile::front_bytes(a.k));  // (kRows, kRowsTaps - 1, kColumns)
  bf16* const taps = past + kRows * (kRowsTaps - 1) * kColumns;              // (kColumns, kRowsTaps)
  bf16* const conv_bias = taps + kRowsTaps * kColumns;                       // (kColumns)
  bf16* const tile = conv_bias + kColumns;                                   // (kRows, kTilePitch)
  bf16* const project = tile + kRows * kTilePitch;                           // (outputs, kTilePitch)
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int first = static_cast<int>(blockIdx.x) * kColumns, first_row = static_cast<int>(blockIdx.y) * kRows;
  const int steps = (a.k + 32 * kWarps - 1) / (32 * kWarps), channels = a.conv_end - a.conv_begin, last_row = a.rows - 1;
  const bool projects = kConvolves && a.part != nullptr && first < a.conv_end;

#pragma unroll 1
  for (int s = 0; s < steps; ++s) {
    const int at = (s * kWarps + warp) * 32 + 8 * t;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const int column = first + 8 * j + g;
      const bool inside = at < a.k && column < a.n;
      copy_async(weights + (s * kN + j) * kThreads + tid, a.w + (inside ? int64_t{column} * a.k + at : 0), inside);
    }
  }
  if constexpr (kConvolves) {
    const int begin = max(a.conv_begin - first, 0) / 8, end = min(a.conv_end - first, kColumns) / 8;  // pieces of 8 columns
    const int channel = first - a.conv_begin;
#pragma unroll 1
    for (int i = tid; i < kRows * (kRowsTaps - 1) * kN; i += kThreads) {
      const int piece = i % kN, slot = i / kN, row = first_row + slot / (kRowsTaps - 1);
      if (piece >= begin && piece < end && row < a.rows)
        copy_async(past + 8 * i, a.conv + (int64_t{first_row} * (kRowsTaps - 1) + slot) * channels + channel + 8 * piece, true);
    }
    if (const int piece = tid / kRowsTaps; piece >= begin && piece < end)
      copy_async(taps + 8 * tid, a.conv_weight + kRowsTaps * channel + 8 * tid, true);
    if (a.conv_bias != nullptr && tid >= begin && tid < end) copy_async(conv_bias + 8 * tid, a.conv_bias + channel + 8 * tid, true);
    if (projects)
#pragma unroll 1
      for (int i = tid; i < a.outputs * kN; i += kThreads)
        copy_async(project + i / kN * kTilePitch + i % kN * 8, a.project + int64_t{i / kN} * channels + first + i % kN * 8, true);
  }
  copy_commit();
  // What is read later: rows and columns beyond the last are computed from others, and not stored.
  const int at_first = warp * 32 + 8 * t;
  int from[2 * kM];
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) from[i] = min(first_row + 8 * i + g, last_row) * static_cast<int>(a.x_row);
  // The scaled rows themselves, shared by the blocks that have nothing more to do: two columns a lane, kOwnRows rows a warp.
  const int idle = a.part != nullptr ? a.conv_end / kColumns : 0, sharers = static_cast<int>(gridDim.x) - idle, mine = static_cast<int>(blockIdx.x) - idle;
  const int width = (a.k / 2 + sharers - 1) / sharers * 2, scaled_end = min(a.k, (mine + 1) * width);
  int scaled_at = mine < 0 ? a.k : mine * width + 2 * lane;
  const bool scales = a.scale.squares != nullptr;
  const int pair_row = tid / Tile::kRowLanes, pair_column = tid % Tile::kRowLanes * 2;  // of the first pair; the others further down
  const bool in_columns = pair_column < kColumns && first + pair_column < a.n;
  wait_for_previous();
  let_next_begin();

  // Asked for before x, used after the products.
  uint32_t residual = 0, unscaled[kOwnRows];
  float2 weight{};
  constexpr int kParts = 4;
  float part[kParts] = {};
  const float* const parts = scales ? a.scale.squares + int64_t{min(first_row + tid / Tile::kPartLanes, last_row)} * a.scale.parts : nullptr;
  const auto read_unscaled = [&] {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i)
      if (scaled_at < scaled_end) unscaled[i] = *reinterpret_cast<const uint32_t*>(a.x + min(first_row + warp + i * kWarps, last_row) * a.x_row + scaled_at);
  };
  if (scales) {
#pragma unroll
    for (int i = 0; i < kParts; ++i)
      if (const int at = tid % Tile::kPartLanes + i * Tile::kPartLanes; at < a.scale.parts) part[i] = parts[at];
    read_unscaled();
  }
  if (!kConvolves && a.residual != nullptr && in_columns) {
    residual = *reinterpret_cast<const uint32_t*>(a.residual + int64_t{min(first_row + pair_row, last_row)} * a.n + first + pair_column);
    weight = *reinterpret_cast<const float2*>(a.weight + first + pair_column);
  }
  float acc[kM][kN][4] = {};
#pragma unroll 1
  for (int base = 0; base < steps; base += kSteps) {
    uint4 x[kSteps][2 * kM];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int at = min(at_first + (base + s) * 32 * kWarps, a.k - 8);  // beyond, the weights are zero
#pragma unroll
      for (int i = 0; i < 2 * kM; ++i) x[s][i] = *reinterpret_cast<const uint4*>(a.x + (from[i] + at));
    }
    if (base == 0) copy_wait<0>();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (base + s >= steps) break;
      const uint4* const at = weights + (base + s) * kN * kThreads + tid;
      uint4 v[kN];
#pragma unroll
      for (int j = 0; j < kN; ++j) v[j] = at[j * kThreads];
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
  if (scales) {
    float square = part[0] + part[1] + part[2] + part[3];
#pragma unroll 1
    for (int at = tid % Tile::kPartLanes + kParts * Tile::kPartLanes; at < a.scale.parts; at += Tile::kPartLanes) square += parts[at];
#pragma unroll
    for (int offset = Tile::kPartLanes / 2; offset > 0; offset /= 2) square += __shfl_xor_sync(0xffffffffu, square, offset);
    if (tid % Tile::kPartLanes == 0) factor[tid / Tile::kPartLanes] = factor_of(a.scale, square, a.k);
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

  if constexpr (kConvolves) {
    static_assert(kRows * kN <= kThreads, "a thread finishes eight columns of a row");
    const int local = tid / kN, piece = tid % kN, at = first + 8 * piece;
    const int64_t row = first_row + local;
    if (local < kRows && row < a.rows && at < a.n) {
      // Neighbours begin with different halves: different banks.
      const int half = (lane ^ lane / 4) % 2 * 4;
      float4 one{}, other{};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float* const eight = sums + (w * kRows + local) * kPitch + 8 * piece;
        const float4 v = *reinterpret_cast<const float4*>(eight + half), u = *reinterpret_cast<const float4*>(eight + (4 - half));
        one = {one.x + v.x, one.y + v.y, one.z + v.z, one.w + v.w};
        other = {other.x + u.x, other.y + u.y, other.z + u.z, other.w + u.w};
      }
      const float4 low = half == 0 ? one : other, high = half == 0 ? other : one;
      float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      if (scales) {
        const float f = factor[local];
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] *= f;
      }
      if (a.bias != nullptr) {
        float b[8];
        unpack(b, *reinterpret_cast<const uint4*>(a.bias + at));
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] += b[i];
      }
      const uint4 made = packed(v);
      *reinterpret_cast<uint4*>(a.y + row * a.y_row + at) = made;
      if (const int channel = at - a.conv_begin; channel >= 0 && channel < channels) {
        uint4 in_order[kRowsTaps];
#pragma unroll
        for (int j = 0; j + 1 < kRowsTaps; ++j) in_order[j] = *reinterpret_cast<const uint4*>(past + (local * (kRowsTaps - 1) + j) * kColumns + 8 * piece);
        in_order[kRowsTaps - 1] = made;
        float p[8] = {}, x[kRowsTaps][8];
        if (a.conv_bias != nullptr) unpack(p, *reinterpret_cast<const uint4*>(conv_bias + 8 * piece));
#pragma unroll
        for (int j = 0; j < kRowsTaps; ++j) unpack(x[j], in_order[j]);
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          float w[8];  // of two channels
          unpack(w, *reinterpret_cast<const uint4*>(taps + kRowsTaps * (8 * piece + i)));
#pragma unroll
          for (int j = 0; j < kRowsTaps; ++j) {
            p[i] += w[j] * x[j][i];
            p[i + 1] += w[kRowsTaps + j] * x[j][i + 1];
          }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) p[i] = silu_of_row(p[i]);
        const uint4 mixed = packed(p);
        bf16* const state = a.conv + row * (kRowsTaps - 1) * channels + channel;
#pragma unroll
        for (int j = 0; j + 1 < kRowsTaps; ++j) *reinterpret_cast<uint4*>(state + int64_t{j} * channels) = in_order[j + 1];
        *reinterpret_cast<uint4*>(a.mixed + row * channels + channel) = mixed;
        *reinterpret_cast<uint4*>(tile + local * kTilePitch + 8 * piece) = mixed;
      }
    }
  } else {
#pragma unroll 1
    for (int q = 0; q < kRows * Tile::kRowLanes / kThreads; ++q) {
      const int local = pair_row + q * (kThreads / Tile::kRowLanes), at = first + pair_column;
      const int64_t row = first_row + local;
      float counted = 0;
      if (in_columns && row < a.rows) {
        float2 s = {0, 0};
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const float2 v = *reinterpret_cast<const float2*>(sums + (w * kRows + local) * kPitch + pair_column);
          s.x += v.x;
          s.y += v.y;
        }
        if (scales) s = {s.x * factor[local], s.y * factor[local]};
        if (a.bias != nullptr) {
          const float2 b = two_of(*reinterpret_cast<const uint32_t*>(a.bias + at));
          s = {s.x + b.x, s.y + b.y};
        }
        if (a.epilogue != Epilogue::none) s = {activate_as(a.epilogue, s.x), activate_as(a.epilogue, s.y)};
        const uint32_t made = pack(s.x, s.y);
        *reinterpret_cast<uint32_t*>(a.y + row * a.y_row + at) = made;
        if (a.residual != nullptr) {
          if (q > 0) residual = *reinterpret_cast<const uint32_t*>(a.residual + row * a.n + at);
          const float2 v = two_of(made), r = two_of(residual);
          const uint32_t sum = pack(v.x + r.x, v.y + r.y);
          const float2 u = two_of(sum);
          *reinterpret_cast<uint32_t*>(a.sum + row * a.n + at) = sum;
          *reinterpret_cast<uint32_t*>(a.weighted + row * a.n + at) = pack(u.x * weight.x, u.y * weight.y);
          counted = u.x * u.x + u.y * u.y;
        }
      }
      if (a.residual != nullptr) {  // the same for the whole block
#pragma unroll
        for (int offset = Tile::kRowLanes / 2; offset > 0; offset /= 2) counted += __shfl_xor_sync(0xffffffffu, counted, offset);
        if (pair_column == 0 && row < a.rows) a.squares[row * gridDim.x + blockIdx.x] = counted;
      }
    }
  }
  if (kConvolves && projects) {
    __syncthreads();
    const int matrix = lane / 8, of = lane % 8;
#pragma unroll 1
    for (int job = warp; job < (a.outputs + 15) / 16 * kM; job += kWarps) {
      const int output = job / kM * 16, m = job % kM;
      const bf16* const left = tile + (16 * m + matrix % 2 * 8 + of) * kTilePitch + matrix / 2 * 8;
      const bf16* const right = project + min(output + matrix / 2 * 8 + of, a.outputs - 1) * kTilePitch + matrix % 2 * 8;
      float d[2][4] = {};
#pragma unroll
      for (int s = 0; s < kColumns / 16; ++s) {
        uint32_t f[4], b[4];
        load_matrices(f, left + 16 * s);
        load_matrices(b, right + 16 * s);
        mma(d[0], f, b[0], b[1]);
        mma(d[1], f, b[2], b[3]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_row + 16 * m + i % 2 * 8 + g, o = output + i / 2 * 8 + 2 * t;
        if (row < a.rows && o < a.outputs)
          *reinterpret_cast<float2*>(a.part + (int64_t{row} * (channels / kColumns) + blockIdx.x) * a.outputs + o) = {d[i / 2][i % 2 * 2], d[i / 2][i % 2 * 2 + 1]};
      }
    }
    return;
  }
  if (!scales) return;
#pragma unroll 1
  while (scaled_at < scaled_end) {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i)
      if (const int local = warp + i * kWarps; first_row + local < a.rows) {
        const float2 v = two_of(unscaled[i]);
        *reinterpret_cast<uint32_t*>(a.scale.normed + int64_t{first_row + local} * a.k + scaled_at) = pack(v.x * factor[local], v.y * factor[local]);
      }
    scaled_at += 64;
    read_unscaled();
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

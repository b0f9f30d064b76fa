#pragma once
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/few_map.h"
#include "kernels/cuda/likeliest.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/step_values.cuh"

namespace krait::kernels::cuda {

/// Constant memory that is read ahead: the load stays where it stands.
__device__ __forceinline__ uint4 read_ahead(const void* p, bool inside) {
  uint4 v = {0, 0, 0, 0};
  if (inside) asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

/// An address that is made where this stands.
template <class T>
__device__ __forceinline__ const T* kept(const T* p) {
  asm volatile("" : "+l"(p));
  return p;
}

template <int kTiles, int kWarps, bool kRounds>
struct FewMapTile {
  static constexpr int kThreads = 32 * kWarps, kColumns = 8 * kTiles, kPitch = kColumns + (kTiles % 4 == 0 ? 8 : 0);
  float sums[kRounds ? 2 : 1][kWarps][kFewRows][kPitch];  // with rounds, of one and of the one before
  float2 stats[kWarps][kFewRows];                         // mean and squares about it, of a warp's share of a row
};

inline constexpr int kFewNormWarps = 8;

/// x, in pieces of 8 values a step of a lane, normed. k is a multiple of 256: lanes hold equally many. Few instructions, and
/// none that wait for one another: a block has two warps for each of its schedulers.
template <int kSteps>
__device__ __forceinline__ void norm_rows(uint4 (&x)[kSteps], const FewMap& a, float2 (&stats)[kFewNormWarps][kFewRows], const float* scale, int at) {
  constexpr int kWarps = kFewNormWarps, kSpan = 32 * kWarps;
  const int warp = static_cast<int>(threadIdx.x) / 32, g = static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
  const int steps = a.k / kSpan;
  const bool inside = g < a.rows;
  float v[kSteps][8];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const float2 p[4] = {two(x[s].x), two(x[s].y), two(x[s].z), two(x[s].w)};
#pragma unroll
    for (int i = 0; i < 8; ++i) v[s][i] = i % 2 == 0 ? p[i / 2].x : p[i / 2].y;
  }
  float mean = 0, squares = 0, count = static_cast<float>(8 * steps);  // RMSNorm: about zero
  if (a.centred) {
    float part[4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s)  // beyond k: zeros
#pragma unroll
      for (int i = 0; i < 8; ++i) part[i % 4] += v[s][i];
    mean = __fdividef((part[0] + part[1]) + (part[2] + part[3]), count);
  }
  {
    float part[4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s >= steps) break;
#pragma unroll
      for (int i = 0; i < 8; ++i) part[i % 4] = fmaf(v[s][i] - mean, v[s][i] - mean, part[i % 4]);
    }
    squares = (part[0] + part[1]) + (part[2] + part[3]);
  }
#pragma unroll
  for (int offset = 1; offset <= 2; offset *= 2) {  // equal shares joined in pairs
    const float other = __shfl_xor_sync(0xffffffffu, mean, offset), off = other - mean;
    squares += __shfl_xor_sync(0xffffffffu, squares, offset) + off * off * 0.5f * count;
    mean = 0.5f * (mean + other);
    count *= 2;
  }
  if (t == 0) stats[warp][g] = {mean, squares};
  copy_wait<0>();  // scale and shift
  __syncthreads();
  float2 part[kWarps], all = {0, 0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) part[w] = stats[w][g];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) all = {all.x + part[w].x, all.y + part[w].y};
  mean = all.x / kWarps;
  float apart = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) apart = fmaf(part[w].x - mean, part[w].x - mean, apart);
  const float rstd = rsqrtf(__fdividef(all.y + count * apart, static_cast<float>(a.k)) + a.eps);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (s >= steps) break;
    const float4* const w = reinterpret_cast<const float4*>(scale + at + s * kSpan);
    const float4* const b = reinterpret_cast<const float4*>(scale + a.k + at + s * kSpan);
    const float4 w0 = w[0], w1 = w[1], b0 = b[0], b1 = b[1];
    const auto normed = [&](int i, float weight, float bias) { return (v[s][i] - mean) * rstd * (weight + a.weight_offset) + bias; };
    const uint4 made = {pack(normed(0, w0.x, b0.x), normed(1, w0.y, b0.y)), pack(normed(2, w0.z, b0.z), normed(3, w0.w, b0.w)),
                        pack(normed(4, w1.x, b1.x), normed(5, w1.y, b1.y)), pack(normed(6, w1.z, b1.z), normed(7, w1.w, b1.w))};
    x[s] = {inside ? made.x : 0, inside ? made.y : 0, inside ? made.z : 0, inside ? made.w : 0};
  }
  if (blockIdx.x != gridDim.x - 1 || !inside) return;
  if (a.normed != nullptr)
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
      if (s < steps) *reinterpret_cast<uint4*>(a.normed + int64_t{g} * a.k + at + s * kSpan) = x[s];
  if (warp == 0 && t == 0) {
    if (a.mean != nullptr) a.mean[g] = mean;
    if (a.rstd != nullptr) a.rstd[g] = rstd;
  }
}

/// What a kernel may do with the values of y that a block has made, where it does nothing.
struct NothingBehind {
  static constexpr bool kThere = false;
};

/// A block: 8 kTiles columns of y at a time for all rows; its warps take pieces of 32 of k in turn, kSteps each, and are
/// added in order. The weights wait in registers when the kernel in front ends. Rows are the first 8 of a tensor core's
/// 16; which value of k sits where in a product does not matter as long as both operands agree, so a lane reads 8
/// neighbours. kRounds: a block makes several such pieces of y.
/// kNorms: it may stand behind a norm. Behind: see few_mlstm.cu.
template <int kTiles, int kSteps, int kWarps, bool kGated, bool kRounds, bool kNorms, class Behind = NothingBehind>
__global__ void __launch_bounds__(32 * kWarps) few_map_kernel(const __grid_constant__ FewMap a, bool early, const __grid_constant__ Behind behind) {
  using Tile = FewMapTile<kTiles, kWarps, kRounds>;
  constexpr int kThreads = Tile::kThreads, kSpan = 32 * kWarps, kOwn = kGated ? Tile::kColumns / 2 : Tile::kColumns;
  static_assert(kThreads >= kFewRows * kOwn);  // a value of y a thread
  extern __shared__ __align__(16) float scale[];  // (k), then the shift's (k)
  __shared__ Tile tile;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int at = warp * 32 + 8 * t;  // of k, in step 0
  const int row = tid / kOwn, own = tid % kOwn;
  int first = static_cast<int>(blockIdx.x) * kOwn;

  if (early) let_next_begin();
  uint4 weights[kSteps][kTiles];
  const auto read_weights = [&] {
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int of_tile = (kGated ? j % (kTiles / 2) : j) * 8 + g;
        const int64_t column = first + of_tile + (kGated && j >= kTiles / 2 ? a.n : 0);
        weights[s][j] = read_ahead(a.w + column * a.k + at + s * kSpan, first + of_tile < a.n && at + s * kSpan < a.k);
      }
  };
  read_weights();
  float bias = a.bias != nullptr && first + own < a.n ? static_cast<float>(a.bias[first + own]) : 0.0f;
  // Addresses are made before the wait.
  const bf16* const from = kept(a.x + g * a.x_row + at);
  const bf16* const added = kept(a.added + int64_t{row} * a.n + first + own);
  const float *const norm_weight = kept(a.norm_weight + 4 * tid), *const norm_bias = kept((a.norm_bias != nullptr ? a.norm_bias : a.norm_weight) + 4 * tid);
  const bool reads = g < a.rows, adds = !kGated && !kRounds && a.total != nullptr && row < a.rows && first + own < a.n;
  const bool norms = kNorms && a.norm_weight != nullptr, shifts = a.norm_bias != nullptr;
  // ptxas moves loads behind the wait, and those of x to where they are used, but not across branches: both of these stand
  // also where no norm is served.
  if (tid == 0 && a.norm_weight != nullptr) {
    bring_into_l2(a.norm_weight, int64_t{4} * a.k);
    if (shifts) bring_into_l2(a.norm_bias, int64_t{4} * a.k);
  }
  [[maybe_unused]] const auto ahead = [&] {
    if constexpr (Behind::kThere)
      return behind.template read_ahead<kOwn>(first, row, own, a.rows);
    else
      return 0;
  }();
  wait_for_previous();
  if (!early) let_next_begin();

  [[maybe_unused]] uint64_t likeliest = 0;  // of this thread's values of y
  uint4 x[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) x[s] = reads && at + s * kSpan < a.k ? read_fresh(from + s * kSpan) : uint4{0, 0, 0, 0};
  float old = 0;  // what y is added to, where a block makes one piece of it
  if (adds) old = read_fresh_one(added);
  if (a.norm_weight != nullptr)  // which may have been made just now
#pragma unroll 1
    for (int i = 4 * tid; i < a.k; i += 4 * kThreads) {
      copy_async(scale + i, norm_weight + (i - 4 * tid), true);
      copy_async(scale + a.k + i, norm_bias + (i - 4 * tid), shifts);
    }
  copy_commit();
  if constexpr (kNorms)
    if (norms) norm_rows(x, a, tile.stats, scale, at);

#pragma unroll 1
  for (int round = 0;; round ^= 1) {
    float acc[2][kTiles][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        mma(acc[0][j], {x[s].x, 0, x[s].y, 0}, weights[s][j].x, weights[s][j].y);
        mma(acc[1][j], {x[s].z, 0, x[s].w, 0}, weights[s][j].z, weights[s][j].w);
      }
    if (g < a.rows)
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        *reinterpret_cast<float2*>(&tile.sums[round][warp][g][8 * j + 2 * t]) = {acc[0][j][0] + acc[1][j][0], acc[0][j][1] + acc[1][j][1]};
    const int column = first + own;
    first += static_cast<int>(gridDim.x) * kOwn;
    const bool more = kRounds && first < a.n;
    float v = bias, up = 0;
    if (more) {
      read_weights();
      if (a.bias != nullptr && first + own < a.n) bias = static_cast<float>(a.bias[first + own]);
    }
    __syncthreads();
    if (row < a.rows && column < a.n) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        v += tile.sums[round][w][row][own];
        if (kGated) up += tile.sums[round][w][row][kOwn + own];
      }
      const int64_t here = int64_t{row} * a.y_row + column, there = int64_t{row} * a.n + column;
      if constexpr (kGated) {
        const auto gate = static_cast<bf16>(v), other = static_cast<bf16>(up);
        a.y[here] = gate;
        a.y[here + a.n] = other;
        const float z = static_cast<float>(gate);
        a.units[there] = static_cast<bf16>(__fdividef(z, 1.0f + __expf(-z)) * static_cast<float>(other));
      } else {
        const auto made = static_cast<bf16>(activate_as(a.epilogue, v));
        a.y[here] = made;
        if constexpr (Behind::kThere) v = static_cast<float>(made);
        if constexpr (kRounds)
          if (column < a.choices) likeliest = max(likeliest, likeliest_key(static_cast<float>(made), column));
        if (a.total != nullptr) a.total[there] = static_cast<bf16>(static_cast<float>(made) + (kRounds ? read_fresh_one(a.added + there) : old));
      }
    }
    if constexpr (Behind::kThere) behind.template finish<kOwn>(ahead, v, row, own, a.rows);
    if (!more) break;
  }
  if constexpr (kRounds) {
    static_assert(kWarps >= kFewRows && kOwn <= 32);
    __shared__ uint64_t keys[kFewRows][kOwn];
    if (a.likeliest == nullptr) return;
    if (row < a.rows) keys[row][own] = likeliest;
    __syncthreads();
    if (warp >= a.rows) return;
    likeliest = likeliest_of_warp(lane < kOwn ? keys[warp][lane] : 0);
    if (lane == 0) a.likeliest[int64_t{warp} * gridDim.x + blockIdx.x] = likeliest;
  }
}

}  // namespace krait::kernels::cuda

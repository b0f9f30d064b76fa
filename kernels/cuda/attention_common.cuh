#pragma once
// What the attention kernels for CUDA share: strided rows, visible tiles, launch parameters.
#include "core/cuda/launch.cuh"
#include "kernels/attention_dropout.h"
#include "kernels/attention_mask.h"
#include "kernels/cuda/attention_own.h"

namespace krait::kernels::cuda {

inline constexpr int64_t kRangeTile = 64;  // granularity of the document ranges; every tile size divides it

/// A (b, l, heads, d) tensor with any strides but the last.
template <class T>
struct Strided {
  T* data;
  int64_t batch, row, head;
  explicit Strided(const Tensor& t)
      : data(t.data<std::remove_const_t<T>>()), batch(t.stride(0)), row(t.stride(1)), head(t.stride(2)) {}
  __device__ T* at(int64_t b, int64_t l, int64_t h) const { return data + b * batch + l * row + h * head; }
};

/// The mask, and per tile of 64 positions the smallest and largest document id, so that tiles without a common
/// document are skipped.
struct TileView {
  AttentionMask mask;
  const int2* q_ranges;  // (b, ceil(lq / 64)), or null
  const int2* k_ranges;  // (b, ceil(lk / 64))

  __device__ bool skip(int64_t b, int64_t i0, int64_t j0) const {
    if (!q_ranges) return false;
    const int2 x = q_ranges[b * ((mask.lq + kRangeTile - 1) / kRangeTile) + i0 / kRangeTile];
    const int2 y = k_ranges[b * ((mask.lk + kRangeTile - 1) / kRangeTile) + j0 / kRangeTile];
    return x.y < y.x || y.y < x.x;
  }
  /// Every query of [i0, i1) sees every key of [j0, j1).
  __device__ bool full(int64_t b, int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    return !mask.q_segments && mask.key_begin(b, i1 - 1) <= j0 && mask.key_end(b, i0) >= j1;
  }
  __device__ bool same_document(int64_t b, int64_t i, int64_t j) const {
    return !mask.q_segments || mask.q_segments[b * mask.lq + i] == mask.k_segments[b * mask.lk + j];
  }
};

/// TileView of a call, with the document ranges it points to.
struct View {
  Tensor q_ranges, k_ranges;
  TileView tiles;
  View(const Tensor& q, const Tensor& k, const AttentionOptions& options);
};

/// Sizes as the kernels want them.
struct HeadShape {
  int64_t b, hq, hkv, group;
  int d;
  HeadShape(const Tensor& q, const Tensor& k)
      : b(q.size(0)), hq(q.size(2)), hkv(k.size(2)), group(hq / hkv), d(static_cast<int>(q.size(3))) {}
};

/// Calls f<true>() with dropout, f<false>() without, which then costs nothing.
template <class F>
void visit_dropout(const AttentionDropout& dropout, F&& f) {
  if (dropout.step)
    f.template operator()<true>();
  else
    f.template operator()<false>();
}

/// Four lanes, x = 0 ... 3, that differ in two neighbouring bits of the lane number, the lower of value `stride`.
/// Each made the kept bits of one Philox call; bit c of the result is bit x of what lane c made. Whole warps call it.
__device__ inline uint32_t exchange_kept(uint32_t bits, int x, int stride) {
  uint32_t result = (bits >> x & 1u) << x;
#pragma unroll
  for (int s = 1; s < 4; ++s) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, bits, s * stride);
    result |= (other >> x & 1u) << (x ^ s);
  }
  return result;
}

/// D_i = do_i . o_i, (b, hq, lq) in the accumulation type.
Tensor attention_delta(const Tensor& do_, const Tensor& o);

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }

}  // namespace krait::kernels::cuda

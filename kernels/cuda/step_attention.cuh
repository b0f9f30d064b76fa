#pragma once
#include "kernels/cuda/few_attention.h"
#include "kernels/cuda/step_values.cuh"

// Attention of one new position a row (few_attention.h).
namespace krait::kernels::cuda {

__device__ __forceinline__ void unpack8(float (&out)[8], uint4 v) {
  const float2 p[4] = {two(v.x), two(v.y), two(v.z), two(v.w)};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = p[i].x;
    out[2 * i + 1] = p[i].y;
  }
}
__device__ __forceinline__ float weight_of(float m, float top) { return m == -INFINITY ? 0.0f : __expf(m - top); }

// cos and sin of position p for 8 rotated columns of a head from `first`, or of interleaved heads for their 4 pairs.
__device__ __forceinline__ void read_rotation(float (&cosine)[8], float (&sine)[8], const StepAttention& a, int p, int first) {
  const int64_t table = int64_t{p} * a.half + (a.interleaved ? first / 2 : first % a.half);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const bool there = i < 4 || !a.interleaved;
    cosine[i] = there ? a.cos[table + i] : 0.0f;
    sine[i] = there ? a.sin[table + i] : 0.0f;
  }
}

// 8 columns of a head from `first`, rotated and rounded like the head; cosine and sine are read_rotation's.
__device__ __forceinline__ uint4 turned(const bf16* head, int first, const float (&cosine)[8], const float (&sine)[8], const StepAttention& a) {
  const uint4 own = read_fresh(head + first);
  if (a.cos == nullptr || first >= 2 * a.half) return own;
  float x[8];
  unpack8(x, own);
  if (a.interleaved) {
    uint4 out;
    uint32_t* const to = &out.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = pack(x[2 * i] * cosine[i] - x[2 * i + 1] * sine[i], x[2 * i] * sine[i] + x[2 * i + 1] * cosine[i]);
    return out;
  }
  const bool second = first >= a.half;
  float other[8];
  unpack8(other, read_fresh(head + (second ? first - a.half : first + a.half)));
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = second ? other[i] * sine[i] + x[i] * cosine[i] : x[i] * cosine[i] - other[i] * sine[i];
  return {pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7])};
}

}  // namespace krait::kernels::cuda

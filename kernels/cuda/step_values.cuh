#pragma once
#include "kernels/cuda/attention_mma.cuh"

// Values in the kernels of a decoding step. pack() (attention_mma.cuh) makes a pair.
namespace krait::kernels::cuda {

/// Two values of bf16, and four.
__device__ __forceinline__ float2 two(uint32_t v) { return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&v)); }
__device__ __forceinline__ float4 four(uint2 v) {
  const float2 a = two(v.x), b = two(v.y);
  return {a.x, a.y, b.x, b.y};
}
__device__ __forceinline__ float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

/// The same by a shift and a mask, where two() permutes bytes: other instructions, which suit other kernels.
__device__ __forceinline__ float2 two_masked(uint32_t v) { return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)}; }
__device__ __forceinline__ float4 four_masked(uint2 v) {
  const float2 a = two_masked(v.x), b = two_masked(v.y);
  return {a.x, a.y, b.x, b.y};
}

/// What kernels in front wrote: from the L2 cache.
__device__ __forceinline__ uint4 read_fresh(const void* p) { return __ldcg(static_cast<const uint4*>(p)); }
__device__ __forceinline__ float read_fresh_one(const bf16* p) { return __uint_as_float(uint32_t{__ldcg(reinterpret_cast<const unsigned short*>(p))} << 16); }

template <class A>
__device__ __forceinline__ A silu_of(A v) {
  return v / (A(1) + exp(-v));
}
template <class A>
__device__ __forceinline__ A softplus_of(A v) {
  return v > A(20) ? v : log1p(exp(v));
}
/// With the exponential of the special function unit, for values that are rounded to bf16.
__device__ __forceinline__ float silu_fast(float v) { return __fdividef(v, 1.0f + __expf(-v)); }
__device__ __forceinline__ float softplus_fast(float v) { return v > 20.0f ? v : log1pf(__expf(v)); }

/// The sum over kLanes neighbours, in all of them.
template <int kLanes, class A>
__device__ __forceinline__ A sum_lanes(A v) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

}  // namespace krait::kernels::cuda

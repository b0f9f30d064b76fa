#pragma once
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/few_rows.h"
#include "kernels/cuda/overlap.cuh"

namespace krait::kernels::cuda {

// What the kernels of few rows (few_rows.h) have in common.
namespace few {

inline constexpr int kThreads = 256, kWarps = kThreads / 32;

__device__ __forceinline__ float2 two(uint32_t v) { return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)}; }
__device__ __forceinline__ float rounded(float v) { return static_cast<float>(static_cast<bf16>(v)); }
__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }
__device__ __forceinline__ float4 four(uint2 v) {
  const float2 a = two(v.x), b = two(v.y);
  return {a.x, a.y, b.x, b.y};
}
__device__ __forceinline__ uint2 packed(float4 v) { return {pack(v.x, v.y), pack(v.z, v.w)}; }
__device__ __forceinline__ float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
__device__ __forceinline__ float4 sum(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
__device__ __forceinline__ float4 product(float4 a, float4 b) { return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w}; }
/// What kernels in front write: from the L2 cache.
__device__ __forceinline__ uint4 fresh16(const void* p) { return __ldcg(static_cast<const uint4*>(p)); }
__device__ __forceinline__ uint2 fresh8(const void* p) { return __ldcg(static_cast<const uint2*>(p)); }
__device__ __forceinline__ float4 fresh(const float* p) { return __ldcg(reinterpret_cast<const float4*>(p)); }
__device__ __forceinline__ float fresh(const bf16* p) { return __uint_as_float(uint32_t{__ldcg(reinterpret_cast<const unsigned short*>(p))} << 16); }
/// The sum over kLanes neighbours, in all of them.
template <int kLanes>
__device__ __forceinline__ float sum_lanes(float v) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

}  // namespace few

}  // namespace krait::kernels::cuda

#pragma once
#include "kernels/cuda/few_rows.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/step_values.cuh"

namespace krait::kernels::cuda {

// What the kernels of few rows (few_rows.h) have in common.
namespace few {

inline constexpr int kThreads = 256, kWarps = kThreads / 32;

__device__ __forceinline__ float rounded(float v) { return static_cast<float>(static_cast<bf16>(v)); }
__device__ __forceinline__ uint2 packed(float4 v) { return {pack(v.x, v.y), pack(v.z, v.w)}; }
__device__ __forceinline__ float4 sum(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }
__device__ __forceinline__ float4 product(float4 a, float4 b) { return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w}; }
/// As read_fresh.
__device__ __forceinline__ uint2 fresh8(const void* p) { return __ldcg(static_cast<const uint2*>(p)); }
__device__ __forceinline__ float4 fresh(const float* p) { return __ldcg(reinterpret_cast<const float4*>(p)); }

}  // namespace few

}  // namespace krait::kernels::cuda

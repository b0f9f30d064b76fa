#pragma once
#include "kernels/cuda/step_values.cuh"

// Products of heads' states, of 128 a channel, with values of a row.
namespace krait::kernels::cuda {

/// A lane's four of 128 values.
__device__ __forceinline__ float4 quad(const bf16* values, int lane) { return four(*reinterpret_cast<const uint2*>(values + 4 * lane)); }
__device__ __forceinline__ float4 quad(const float* values, int lane) { return *reinterpret_cast<const float4*>(values + 4 * lane); }
__device__ __forceinline__ void add_scaled(float4& a, float f, float4 b) {
  a = {a.x + f * b.x, a.y + f * b.y, a.z + f * b.z, a.w + f * b.w};
}

/// Lanes 4 i to 4 i + 3 receive parts, to be added over the four, of the sum of v[i] over the warp.
__device__ __forceinline__ float sum_of_own(const float (&v)[8], int lane) {
  float a[4], b[2];
  const bool first = lane & 16, second = lane & 8, third = lane & 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = (first ? v[4 + i] : v[i]) + __shfl_xor_sync(0xffffffffu, first ? v[i] : v[4 + i], 16);
#pragma unroll
  for (int i = 0; i < 2; ++i) b[i] = (second ? a[2 + i] : a[i]) + __shfl_xor_sync(0xffffffffu, second ? a[i] : a[2 + i], 8);
  return (third ? b[1] : b[0]) + __shfl_xor_sync(0xffffffffu, third ? b[0] : b[1], 4);
}

}  // namespace krait::kernels::cuda

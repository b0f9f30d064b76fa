#pragma once

namespace krait::kernels::cuda {

inline constexpr float kLog2e = 1.4426950408889634f;

/// 2^x to 2 ulp by the special function unit, one instruction; 0 below -126.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/// 1 / x to 1 ulp; 0 where |x| is above 2^126.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace krait::kernels::cuda

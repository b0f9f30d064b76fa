#pragma once
#include <cstdint>

namespace krait::kernels::cuda {

/// Rises with the number.
__device__ __forceinline__ uint32_t ordered(float s) {
  const uint32_t bits = __float_as_uint(s);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/// The largest of these belongs to the first of the largest: the larger number, then the smaller index.
__device__ __forceinline__ uint64_t likeliest_key(float s, int index) {
  return uint64_t{ordered(s)} << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(index));
}
__device__ __forceinline__ int64_t likeliest_index(uint64_t key) { return static_cast<int64_t>(0xFFFFFFFFu - static_cast<uint32_t>(key)); }

}  // namespace krait::kernels::cuda

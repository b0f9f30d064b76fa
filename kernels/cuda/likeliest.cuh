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
/// The largest of a warp's, to all of its lanes.
__device__ __forceinline__ uint64_t likeliest_of_warp(uint64_t key) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) key = max(key, uint64_t{__shfl_xor_sync(0xffffffffu, key, offset)});
  return key;
}

}  // namespace krait::kernels::cuda

#pragma once
#include "kernels/cuda/step_values.cuh"

namespace krait::kernels::cuda {

/// d += of 16 rows of a tile and 8 of a projection the products over 16 kSteps columns, both in shared memory with `pitch`
/// values from row to row. `left` and `right` are the lane's: row g (of the 16, of the 8), column 2 t.
template <int kSteps>
__device__ __forceinline__ void project_tile(float (&d)[4], const bf16* left, const bf16* right, int pitch) {
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    uint32_t f[4], b[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) f[i] = *reinterpret_cast<const uint32_t*>(left + i % 2 * 8 * pitch + 16 * s + i / 2 * 8);
#pragma unroll
    for (int i = 0; i < 2; ++i) b[i] = *reinterpret_cast<const uint32_t*>(right + 16 * s + 8 * i);
    mma(d, f, b[0], b[1]);
  }
}

}  // namespace krait::kernels::cuda

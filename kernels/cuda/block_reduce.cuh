#pragma once

namespace krait::kernels::cuda {

/// Combines one value per thread of the block (a multiple of 32 threads, at most 1024) in a fixed order; every
/// thread gets the result. `shared` holds 32 values and may be used again at once.
template <class A, class F>
__device__ A block_reduce(A value, A* shared, F join) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int offset = 16; offset > 0; offset /= 2) value = join(value, __shfl_xor_sync(0xFFFFFFFFu, value, offset));
  if (warps == 1) return value;
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  value = shared[0];
  for (int w = 1; w < warps; ++w) value = join(value, shared[w]);
  __syncthreads();
  return value;
}

}  // namespace krait::kernels::cuda

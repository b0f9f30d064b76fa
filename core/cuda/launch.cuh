#pragma once
#include <cuda_runtime.h>

#include <utility>

#include "core/cuda/check.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace krait {
inline namespace core {

struct LaunchConfig {
  int64_t grid = 0;
  int64_t grid_y = 1, grid_z = 1;
  int block = 256;
  int64_t shared = 0;  // dynamic shared memory in bytes; more than 48 KiB is asked for automatically
  Stream stream;
};

inline cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream.handle); }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Launches a kernel on the stream. An empty grid does nothing; a failed launch throws with grid and block.
template <class... P, class... A>
void launch(void (*kernel)(P...), const LaunchConfig& c, A&&... arguments) {
  if (c.grid <= 0 || c.grid_y <= 0 || c.grid_z <= 0) return;
  KRAIT_CHECK(c.grid < (int64_t{1} << 31) && c.grid_y < 65536 && c.grid_z < 65536,
              "CUDA grid ({}, {}, {}) is too large; use a smaller batch", c.grid, c.grid_y, c.grid_z);
  if (c.shared > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(c.shared)));
  const dim3 grid(static_cast<unsigned>(c.grid), static_cast<unsigned>(c.grid_y), static_cast<unsigned>(c.grid_z));
  kernel<<<grid, c.block, static_cast<size_t>(c.shared), native(c.stream)>>>(static_cast<P>(arguments)...);
  const cudaError_t status = cudaGetLastError();
  KRAIT_CHECK(status == cudaSuccess, "CUDA launch with grid ({}, {}, {}), block {}, {} bytes of shared memory: {}",
              c.grid, c.grid_y, c.grid_z, c.block, c.shared, cudaGetErrorString(status));
}

}  // namespace core
}  // namespace krait

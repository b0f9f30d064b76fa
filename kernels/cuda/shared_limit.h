#pragma once
#include "core/cuda/check.h"
#include "core/device.h"

namespace krait::kernels::cuda {

/// Bytes of shared memory that a block may ask for.
inline int64_t shared_limit(Device device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index));
  return bytes;
}

}  // namespace krait::kernels::cuda

#pragma once
#include "core/dispatch.h"
#include "core/random.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// Which random numbers a dropout mask is made of: element i of the tensor uses element offset + i of stream
/// `key` at `step` (see RandomSource). The step is read on the device.
struct DropoutMask {
  double p = 0;  // probability of zero, in [0, 1)
  uint64_t key = 0;
  Tensor step;  // int64 scalar on the tensor's device
  int64_t offset = 0;
};

/// y[i] = u[i] < p ? 0 : x[i] / (1 - p), u uniform in [0, 1). The gradient of dropout is dropout of dy with the
/// same mask, so the mask is never stored. CPU and CUDA give the same bits. fp32, fp64 or bf16.
Tensor dropout(const Tensor& x, const DropoutMask& mask);
/// residual + dropout(x), rounded once.
Tensor dropout_add(const Tensor& x, const Tensor& residual, const DropoutMask& mask);

/// A mask is the comparison of 24 random bits with this.
KRAIT_HOST_DEVICE inline uint32_t dropout_threshold(double p) {
  const double scaled = p * 16777216.0;
  const auto whole = static_cast<uint32_t>(scaled);
  return whole + (static_cast<double>(whole) < scaled ? 1u : 0u);
}

// Contiguous, not empty. `residual` may be undefined.
KRAIT_BACKENDS(void dropout(Tensor& y, const Tensor& x, const Tensor& residual, const DropoutMask& mask))

}  // namespace kernels
}  // namespace krait

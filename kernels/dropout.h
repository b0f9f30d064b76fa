#pragma once
#include "core/dispatch.h"
#include "core/random.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// Which random numbers a dropout mask is made of: element i of the tensor uses element offset + i of stream
/// `key` at `step` (see RandomSource). The step is read on the device.
/// A piece of a larger tensor (a rank's positions or channels) draws the numbers that its elements have there: it is
/// runs of `run` neighbours, and with i = (g runs + j) run + c it uses offset + g group_stride + j run_stride + c.
struct DropoutMask {
  double p = 0;  // probability of zero, in [0, 1)
  uint64_t key = 0;
  Tensor step;  // int64 scalar on the tensor's device
  int64_t offset = 0;
  int64_t run = 0;  // 0: the whole tensor is one run
  int64_t runs = 1, run_stride = 0, group_stride = 0;

  /// Element 0 of run r, and how long the runs are in a tensor of n elements.
  KRAIT_HOST_DEVICE static int64_t start(int64_t r, int64_t offset, int64_t runs, int64_t run_stride,
                                         int64_t group_stride) {
    return offset + r / runs * group_stride + r % runs * run_stride;
  }
  int64_t run_of(int64_t n) const { return run == 0 ? n : run; }
};

/// y[i] = u[i] < p ? 0 : x[i] / (1 - p), u uniform in [0, 1). The gradient of dropout is dropout of dy with the
/// same mask, so the mask is never stored. CPU and CUDA give the same bits. fp32, fp64 or bf16.
Tensor dropout(const Tensor& x, const DropoutMask& mask);
/// residual + dropout(x), rounded once.
Tensor dropout_add(const Tensor& x, const Tensor& residual, const DropoutMask& mask);

/// Throws, in the name of op, where the mask does not fit x.
void check_mask(const char* op, const Tensor& x, const DropoutMask& mask);

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

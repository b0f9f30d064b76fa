#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// Over the last dimension, c values per row; m = max_c x, s = sum_c exp(x - m):
///   softmax:      y = exp(x - m) / s           dx = y (dy - sum_c dy y)
///   log_softmax:  y = x - m - log s            dx = dy - exp(y) sum_c dy
/// fp32, fp64 or bf16, computed in fp32 (fp64 for fp64). A row of -inf alone gives NaN.
Tensor softmax_forward(const Tensor& x);
Tensor softmax_backward(const Tensor& dy, const Tensor& y);
Tensor log_softmax_forward(const Tensor& x);
Tensor log_softmax_backward(const Tensor& dy, const Tensor& y);

// All contiguous, (r, c), not empty.
KRAIT_BACKENDS(void softmax_forward(Tensor& y, const Tensor& x);
               void softmax_backward(Tensor& dx, const Tensor& dy, const Tensor& y);
               void log_softmax_forward(Tensor& y, const Tensor& x);
               void log_softmax_backward(Tensor& dx, const Tensor& dy, const Tensor& y))

}  // namespace kernels
}  // namespace krait

#pragma once
#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

/// What a convolution returns: y like x, and the last k - 1 inputs for the next call.
struct ConvOut { Variable y, final_state; };

/// Causal depthwise convolution of x (b, l, c) with weight (c, k), bias (c) or undefined, the k - 1 inputs before t = 0
/// (b, k-1, c) or undefined; then silu or nothing. Taps do not cross documents. See kernels/causal_conv1d.h.
ConvOut causal_conv1d(const Variable& x, const Variable& weight, const Variable& bias, const Variable& initial_state,
                      bool silu, const Tensor& segments = {});

}  // namespace autograd
}  // namespace krait

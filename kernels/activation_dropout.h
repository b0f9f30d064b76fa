#pragma once
#include "kernels/activation.h"
#include "kernels/dropout.h"

namespace krait {
namespace kernels {

/// dropout(f(x)) in one pass; the mask is that of dropout. fp32, fp64 or bf16.
Tensor activation_dropout_forward(const Tensor& x, Activation f, const DropoutMask& mask);
/// dx = f'(x) dropout(dy); mask and f are recomputed.
Tensor activation_dropout_backward(const Tensor& dy, const Tensor& x, Activation f, const DropoutMask& mask);

// Backends: contiguous, equal shapes, not empty.
KRAIT_BACKENDS(void activation_dropout_forward(Tensor& y, const Tensor& x, Activation f, const DropoutMask& mask);
               void activation_dropout_backward(Tensor& dx, const Tensor& dy, const Tensor& x, Activation f,
                                                const DropoutMask& mask))

}  // namespace kernels
}  // namespace krait

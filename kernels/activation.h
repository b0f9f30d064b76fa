#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// With s the logistic function and Phi the normal distribution function:
///   silu       x s(x)                     derivative  s(x) (1 + x (1 - s(x)))
///   gelu_erf   x Phi(x)                               Phi(x) + x exp(-x^2/2) / sqrt(2 pi)
///   gelu_tanh  x (1 + tanh u) / 2, u = sqrt(2/pi) (x + 0.044715 x^3)   (GPT-2's)
///   relu2      max(x, 0)^2                            2 max(x, 0)
///   sigmoid    s(x)                                   s(x) (1 - s(x))
enum class Activation : uint8_t { silu, gelu_tanh, gelu_erf, relu2, sigmoid };

/// y = f(x), elementwise: fp32, bf16 (computed in fp32) or fp64, any shape.
Tensor activation_forward(const Tensor& x, Activation f);
/// dx = dy f'(x); f is recomputed from x, nothing else is saved.
Tensor activation_backward(const Tensor& dy, const Tensor& x, Activation f);

/// Gated units (Shazeer 2020): y = f(gate) up. gate and up (..., f), e.g. the halves of one (..., 2f) projection:
/// their last dimension must be contiguous, their rows may be apart. SwiGLU is silu, GeGLU is gelu, GLU is sigmoid.
Tensor glu_forward(const Tensor& gate, const Tensor& up, Activation f);
struct GluGrad { Tensor dgate, dup; };
/// dgate = dy up f'(gate), dup = dy f(gate).
GluGrad glu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up, Activation f);

/// The same on x (..., 2f) = [gate; up], or [up; gate] with gate_last; dx (..., 2f) is written in one pass.
Tensor glu_packed_forward(const Tensor& x, Activation f, bool gate_last = false);
Tensor glu_packed_backward(const Tensor& dy, const Tensor& x, Activation f, bool gate_last = false);

// Backends. Plain: contiguous, equal shapes. Gated: all (r, f) with contiguous last dimension; y and dy contiguous,
// gate and up with one row stride, dgate and dup too.
KRAIT_BACKENDS(void activation_forward(Tensor& y, const Tensor& x, Activation f);
               void activation_backward(Tensor& dx, const Tensor& dy, const Tensor& x, Activation f);
               void glu_forward(Tensor& y, const Tensor& gate, const Tensor& up, Activation f);
               void glu_backward(Tensor& dgate, Tensor& dup, const Tensor& dy, const Tensor& gate, const Tensor& up,
                                 Activation f))

}  // namespace kernels
}  // namespace krait

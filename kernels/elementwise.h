#pragma once
#include <span>

#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

// Elementwise operations with NumPy broadcasting: y[i] = f(a[i], b[i], c[i]; p, q).
// Inputs: fp32, fp64 or bf16, same dtype and device, any strides. Computed in fp32 (fp64 for fp64), rounded once.
// The result is a new contiguous tensor of the inputs' dtype, or bool for comparisons.
//
// To add an operation, add a line here: a name and its value in terms of a, b, c, p, q of type A (float or
// double). `math::` holds the elementary functions of the backend. Names ending in _grad take dy first.

// X(name, value): Tensor name(a)
#define KRAIT_UNARY(X)                                        \
  X(neg, -a)                                                  \
  X(exp, math::exp(a))                                        \
  X(expm1, math::expm1(a))                                    \
  X(log, math::log(a))                                        \
  X(log1p, math::log1p(a))                                    \
  X(sqrt, math::sqrt(a))                                      \
  X(rsqrt, A(1) / math::sqrt(a))                              \
  X(square, a * a)                                            \
  X(reciprocal, A(1) / a)                                     \
  X(abs, math::abs(a))                                        \
  X(sign, a > A(0) ? A(1) : (a < A(0) ? A(-1) : a))           \
  X(sin, math::sin(a))                                        \
  X(cos, math::cos(a))                                        \
  X(tanh, math::tanh(a))                                      \
  X(sigmoid, math::sigmoid(a))                                \
  X(erf, math::erf(a))                                        \
  X(softplus, math::softplus(a))                              \
  X(logsigmoid, -math::softplus(-a))                          \
  X(relu, a < A(0) ? A(0) : a)

// X(name, value): Tensor name(a, p)
#define KRAIT_SCALAR(X)                     \
  X(add_scalar, a + p)                      \
  X(mul_scalar, a * p)                      \
  X(rsub_scalar, p - a)                     \
  X(rdiv_scalar, p / a)                     \
  X(pow_scalar, math::pow(a, p))

// X(name, value): Tensor name(a, p, q)
#define KRAIT_SCALAR2(X) X(clamp, a < p ? p : (a > q ? q : a))

// X(name, value): Tensor name(a, b)
#define KRAIT_BINARY(X)                                                         \
  X(add, a + b)                                                                 \
  X(sub, a - b)                                                                 \
  X(mul, a * b)                                                                 \
  X(div, a / b)                                                                 \
  X(pow, math::pow(a, b))                                                       \
  X(maximum, a > b || a != a ? a : b)                                           \
  X(minimum, a < b || a != a ? a : b)                                           \
  /* gradients of unary operations: a = dy, b = the saved input or output */    \
  X(expm1_grad, a * (b + A(1)))                /* b = y */                      \
  X(log1p_grad, a / (b + A(1)))                /* b = x */                      \
  X(sqrt_grad, A(0.5) * a / b)                 /* b = y */                      \
  X(rsqrt_grad, A(-0.5) * a * b * b * b)       /* b = y */                      \
  X(square_grad, A(2) * a * b)                 /* b = x */                      \
  X(reciprocal_grad, -a * b * b)               /* b = y */                      \
  X(abs_grad, b > A(0) ? a : (b < A(0) ? -a : a * b)) /* b = x */               \
  X(sin_grad, a * math::cos(b))                /* b = x */                      \
  X(cos_grad, -a * math::sin(b))               /* b = x */                      \
  /* from x: 1 - y^2 of a y rounded to bf16 would have no correct digit near 1 */ \
  X(tanh_grad, a * (A(1) - math::tanh(b) * math::tanh(b)))                      \
  X(sigmoid_grad, a * math::sigmoid(b) * math::sigmoid(-b))                     \
  X(erf_grad, a * A(1.1283791670955126) * math::exp(-b * b)) /* b = x */        \
  X(softplus_grad, a * math::sigmoid(b))       /* b = x */                      \
  X(logsigmoid_grad, a * math::sigmoid(-b))    /* b = x */                      \
  X(relu_grad, b > A(0) ? a : A(0))            /* b = y */

// X(name, value): Tensor name(a, b, p)
#define KRAIT_BINARY_SCALAR(X)                                                             \
  X(rdiv_scalar_grad, -a * p / (b * b))                        /* b = x */                 \
  X(pow_scalar_grad, p == A(0) ? A(0) : a * p * math::pow(b, p - A(1))) /* b = x */

// X(name, value): Tensor name(a, b, p, q)
#define KRAIT_BINARY_SCALAR2(X) X(clamp_grad, b >= p && b <= q ? a : A(0)) /* b = x */

// X(name, value): Tensor name(a, b, c)
#define KRAIT_TERNARY(X)                                                                                      \
  /* d/db of dy max(b, c): ties share the gradient */                                                         \
  X(maximum_grad, b > c ? a : (b == c ? A(0.5) * a : A(0)))                                                   \
  /* d/dc of dy (b / c) */                                                                                    \
  X(div_grad, -a * b / (c * c))                                                                               \
  /* d/db and d/dc of dy b^c; the latter is 0 at b = 0 */                                                     \
  X(pow_grad_base, c == A(0) ? A(0) : a * c * math::pow(b, c - A(1)))                                         \
  X(pow_grad_exponent, b == A(0) ? A(0) : a * math::pow(b, c) * math::log(b))

// X(name, value): bool Tensor name(a, b); int64 too, exact up to 2^53.
#define KRAIT_COMPARISON(X) \
  X(less, a < b)            \
  X(greater, a > b)         \
  X(equal, a == b)

#define X(name, value) Tensor name(const Tensor& a);
KRAIT_UNARY(X)
#undef X
#define X(name, value) Tensor name(const Tensor& a, double p);
KRAIT_SCALAR(X)
#undef X
#define X(name, value) Tensor name(const Tensor& a, double p, double q);
KRAIT_SCALAR2(X)
#undef X
#define X(name, value) Tensor name(const Tensor& a, const Tensor& b);
KRAIT_BINARY(X)
KRAIT_COMPARISON(X)
#undef X
#define X(name, value) Tensor name(const Tensor& a, const Tensor& b, double p);
KRAIT_BINARY_SCALAR(X)
#undef X
#define X(name, value) Tensor name(const Tensor& a, const Tensor& b, double p, double q);
KRAIT_BINARY_SCALAR2(X)
#undef X
#define X(name, value) Tensor name(const Tensor& a, const Tensor& b, const Tensor& c);
KRAIT_TERNARY(X)
#undef X

/// mask ? a : b; mask is bool, a and b of one dtype; the three broadcast.
Tensor where(const Tensor& mask, const Tensor& a, const Tensor& b);

/// The 1 to 3 inputs of a backend, expanded to the output's shape.
using Inputs = std::span<const Tensor>;

// One function per operation and backend, all with this signature. y is contiguous and not empty.
#define X(name, value) void name(Tensor& y, Inputs in, double p, double q);
KRAIT_BACKENDS(KRAIT_UNARY(X) KRAIT_SCALAR(X) KRAIT_SCALAR2(X) KRAIT_BINARY(X) KRAIT_BINARY_SCALAR(X)
                   KRAIT_BINARY_SCALAR2(X) KRAIT_TERNARY(X) KRAIT_COMPARISON(X) X(where, ))
#undef X

}  // namespace kernels
}  // namespace krait

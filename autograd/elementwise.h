#pragma once
#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

// Elementwise functions with NumPy broadcasting; inputs of one dtype (cast() converts). See kernels/elementwise.h.
Variable add(const Variable& a, const Variable& b);
Variable sub(const Variable& a, const Variable& b);
Variable mul(const Variable& a, const Variable& b);
Variable div(const Variable& a, const Variable& b);
/// a^b; the gradient of the exponent is taken as 0 where a = 0.
Variable pow(const Variable& a, const Variable& b);
/// Where a = b, each gets half of the gradient.
Variable maximum(const Variable& a, const Variable& b);
Variable minimum(const Variable& a, const Variable& b);
/// mask ? a : b, with a bool mask.
Variable where(const Tensor& mask, const Variable& a, const Variable& b);

Variable add(const Variable& a, double b);
Variable mul(const Variable& a, double b);
Variable pow(const Variable& a, double exponent);
/// The gradient is dy inside [low, high], bounds included, and 0 outside.
Variable clamp(const Variable& a, double low, double high);

Variable neg(const Variable& a);
Variable exp(const Variable& a);
Variable expm1(const Variable& a);
Variable log(const Variable& a);
Variable log1p(const Variable& a);
Variable sqrt(const Variable& a);
Variable rsqrt(const Variable& a);
Variable square(const Variable& a);
Variable reciprocal(const Variable& a);
Variable abs(const Variable& a);  // gradient 0 at 0
Variable sin(const Variable& a);
Variable cos(const Variable& a);
Variable tanh(const Variable& a);
Variable sigmoid(const Variable& a);
Variable erf(const Variable& a);
Variable softplus(const Variable& a);
Variable logsigmoid(const Variable& a);
Variable relu(const Variable& a);  // gradient 0 at 0

inline Variable operator+(const Variable& a, const Variable& b) { return add(a, b); }
inline Variable operator-(const Variable& a, const Variable& b) { return sub(a, b); }
inline Variable operator*(const Variable& a, const Variable& b) { return mul(a, b); }
inline Variable operator/(const Variable& a, const Variable& b) { return div(a, b); }
inline Variable operator-(const Variable& a) { return neg(a); }
inline Variable operator+(const Variable& a, double b) { return add(a, b); }
inline Variable operator+(double a, const Variable& b) { return add(b, a); }
inline Variable operator-(const Variable& a, double b) { return add(a, -b); }
Variable operator-(double a, const Variable& b);
inline Variable operator*(const Variable& a, double b) { return mul(a, b); }
inline Variable operator*(double a, const Variable& b) { return mul(b, a); }
inline Variable operator/(const Variable& a, double b) { return mul(a, 1.0 / b); }
Variable operator/(double a, const Variable& b);

}  // namespace autograd
}  // namespace krait

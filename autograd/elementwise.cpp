#include "autograd/elementwise.h"

#include "kernels/elementwise.h"
#include "kernels/reduce.h"

namespace krait::autograd {

namespace k = kernels;

namespace {

// Two broadcast inputs; da(dy) and db(dy) are asked for only where wanted and summed back to the input's shape.
template <class DA, class DB>
Variable binary(std::string_view name, const Variable& a, const Variable& b, const Tensor& y, DA da, DB db) {
  return record(name, {a, b}, y,
                [da, db, sa = a.shape(), sb = b.shape(), wa = a.requires_grad(),
                 wb = b.requires_grad()](const Tensor& dy) -> Grads {
                  return {wa ? k::sum_to(da(dy), sa) : Tensor(), wb ? k::sum_to(db(dy), sb) : Tensor()};
                });
}

template <class DX>
Variable unary(std::string_view name, const Variable& x, const Tensor& y, DX dx) {
  return record(name, {x}, y, [dx](const Tensor& dy) -> Grads { return {dx(dy)}; });
}

Tensor zero_like(const Tensor& dy) { return zeros({}, dy.dtype(), dy.device()).expand(dy.shape()); }

}  // namespace

Variable add(const Variable& a, const Variable& b) {
  const auto pass = [](const Tensor& dy) { return dy; };
  return binary("add", a, b, k::add(a.data(), b.data()), pass, pass);
}

Variable sub(const Variable& a, const Variable& b) {
  return binary("sub", a, b, k::sub(a.data(), b.data()), [](const Tensor& dy) { return dy; },
                [](const Tensor& dy) { return k::neg(dy); });
}

Variable mul(const Variable& a, const Variable& b) {
  return binary("mul", a, b, k::mul(a.data(), b.data()), [b = b.data()](const Tensor& dy) { return k::mul(dy, b); },
                [a = a.data()](const Tensor& dy) { return k::mul(dy, a); });
}

Variable div(const Variable& a, const Variable& b) {
  return binary("div", a, b, k::div(a.data(), b.data()), [b = b.data()](const Tensor& dy) { return k::div(dy, b); },
                [a = a.data(), b = b.data()](const Tensor& dy) { return k::div_grad(dy, a, b); });
}

Variable pow(const Variable& a, const Variable& b) {
  return binary("pow", a, b, k::pow(a.data(), b.data()),
                [a = a.data(), b = b.data()](const Tensor& dy) { return k::pow_grad_base(dy, a, b); },
                [a = a.data(), b = b.data()](const Tensor& dy) { return k::pow_grad_exponent(dy, a, b); });
}

Variable maximum(const Variable& a, const Variable& b) {
  return binary("maximum", a, b, k::maximum(a.data(), b.data()),
                [a = a.data(), b = b.data()](const Tensor& dy) { return k::maximum_grad(dy, a, b); },
                [a = a.data(), b = b.data()](const Tensor& dy) { return k::maximum_grad(dy, b, a); });
}

Variable minimum(const Variable& a, const Variable& b) {
  return binary("minimum", a, b, k::minimum(a.data(), b.data()),
                [a = a.data(), b = b.data()](const Tensor& dy) { return k::maximum_grad(dy, b, a); },
                [a = a.data(), b = b.data()](const Tensor& dy) { return k::maximum_grad(dy, a, b); });
}

Variable where(const Tensor& mask, const Variable& a, const Variable& b) {
  return binary("where", a, b, k::where(mask, a.data(), b.data()),
                [mask](const Tensor& dy) { return k::where(mask, dy, zero_like(dy)); },
                [mask](const Tensor& dy) { return k::where(mask, zero_like(dy), dy); });
}

Variable add(const Variable& a, double b) {
  return unary("add", a, k::add_scalar(a.data(), b), [](const Tensor& dy) { return dy; });
}

Variable mul(const Variable& a, double b) {
  return unary("mul", a, k::mul_scalar(a.data(), b), [b](const Tensor& dy) { return k::mul_scalar(dy, b); });
}

Variable operator-(double a, const Variable& b) {
  return unary("sub", b, k::rsub_scalar(b.data(), a), [](const Tensor& dy) { return k::neg(dy); });
}

Variable operator/(double a, const Variable& b) {
  return unary("div", b, k::rdiv_scalar(b.data(), a),
               [a, b = b.data()](const Tensor& dy) { return k::rdiv_scalar_grad(dy, b, a); });
}

Variable pow(const Variable& a, double exponent) {
  return unary("pow", a, k::pow_scalar(a.data(), exponent),
               [exponent, a = a.data()](const Tensor& dy) { return k::pow_scalar_grad(dy, a, exponent); });
}

Variable clamp(const Variable& a, double low, double high) {
  KRAIT_CHECK(low <= high, "clamp: the lower bound {} is above the upper bound {}", low, high);
  return unary("clamp", a, k::clamp(a.data(), low, high),
               [low, high, a = a.data()](const Tensor& dy) { return k::clamp_grad(dy, a, low, high); });
}

Variable neg(const Variable& a) {
  return unary("neg", a, k::neg(a.data()), [](const Tensor& dy) { return k::neg(dy); });
}

// The gradient is a kernel of dy and the output.
#define KRAIT_FROM_OUTPUT(name, grad)                                                           \
  Variable name(const Variable& a) {                                                            \
    const Tensor y = k::name(a.data());                                                         \
    return unary(#name, a, y, [y](const Tensor& dy) { return k::grad(dy, y); });                \
  }
// The gradient is a kernel of dy and the input.
#define KRAIT_FROM_INPUT(name, grad)                                                            \
  Variable name(const Variable& a) {                                                            \
    return unary(#name, a, k::name(a.data()), [x = a.data()](const Tensor& dy) { return k::grad(dy, x); }); \
  }
KRAIT_FROM_OUTPUT(exp, mul)
KRAIT_FROM_OUTPUT(expm1, expm1_grad)
KRAIT_FROM_INPUT(log, div)
KRAIT_FROM_INPUT(log1p, log1p_grad)
KRAIT_FROM_OUTPUT(sqrt, sqrt_grad)
KRAIT_FROM_OUTPUT(rsqrt, rsqrt_grad)
KRAIT_FROM_INPUT(square, square_grad)
KRAIT_FROM_OUTPUT(reciprocal, reciprocal_grad)
KRAIT_FROM_INPUT(abs, abs_grad)
KRAIT_FROM_INPUT(sin, sin_grad)
KRAIT_FROM_INPUT(cos, cos_grad)
KRAIT_FROM_INPUT(tanh, tanh_grad)
KRAIT_FROM_INPUT(sigmoid, sigmoid_grad)
KRAIT_FROM_INPUT(erf, erf_grad)
KRAIT_FROM_INPUT(softplus, softplus_grad)
KRAIT_FROM_INPUT(logsigmoid, logsigmoid_grad)
KRAIT_FROM_OUTPUT(relu, relu_grad)

}  // namespace krait::autograd

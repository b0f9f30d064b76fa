#pragma once
// Activations with their derivatives, as types.
#include "kernels/activation.h"

namespace krait::kernels::cuda {

__device__ __forceinline__ float exp_of(float x) { return __expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float ratio(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double ratio(double a, double b) { return a / b; }
__device__ __forceinline__ float erf_of(float x) { return erff(x); }
__device__ __forceinline__ double erf_of(double x) { return erf(x); }
// 1 - 2 / (e^2x + 1): absolute error 1e-7 in fp32, and right at both infinities. __fdividef needs a divisor below
// 2^126, so the argument is cut at 40, where tanh is 1.
__device__ __forceinline__ float tanh_of(float x) {
  return 1.0f - __fdividef(2.0f, __expf(2.0f * fminf(x, 40.0f)) + 1.0f);
}
__device__ __forceinline__ double tanh_of(double x) { return tanh(x); }

template <class A>
struct ValueAndSlope { A value, slope; };

struct Silu {
  template <class A>
  static __device__ __forceinline__ ValueAndSlope<A> at(A x) {
    const A c = x < A(-80) ? A(-80) : x;  // silu(-infinity) = 0; e^80 is a legal divisor
    const A s = ratio(A(1), A(1) + exp_of(-c));
    return {c * s, s * (A(1) + c * (A(1) - s))};
  }
};
struct GeluTanh {
  template <class A>
  static __device__ __forceinline__ ValueAndSlope<A> at(A x) {
    const A k = A(0.79788456080286535588), q = A(0.044715);
    const A t = tanh_of(k * (x + q * x * x * x)), half = A(0.5) * (A(1) + t);
    return {x * half, half + A(0.5) * x * (A(1) - t * t) * k * (A(1) + A(3) * q * x * x)};
  }
};
struct GeluErf {
  template <class A>
  static __device__ __forceinline__ ValueAndSlope<A> at(A x) {
    const A phi = A(0.5) * (A(1) + erf_of(x * A(0.70710678118654752440)));
    return {x * phi, phi + x * A(0.39894228040143267794) * exp_of(A(-0.5) * x * x)};
  }
};
struct Relu2 {
  template <class A>
  static __device__ __forceinline__ ValueAndSlope<A> at(A x) {
    const A p = x < A(0) ? A(0) : x;  // keeps NaN
    return {p * p, A(2) * p};
  }
};

struct Sigmoid {
  template <class A>
  static __device__ __forceinline__ ValueAndSlope<A> at(A x) {
    const A s = ratio(A(1), A(1) + exp_of(x < A(-80) ? A(80) : -x));  // e^80 is a legal divisor
    return {s, s * (A(1) - s)};
  }
};

template <class F>
void visit_activation(Activation f, F&& body) {
  switch (f) {
    case Activation::silu: return body.template operator()<Silu>();
    case Activation::gelu_tanh: return body.template operator()<GeluTanh>();
    case Activation::gelu_erf: return body.template operator()<GeluErf>();
    case Activation::relu2: return body.template operator()<Relu2>();
    case Activation::sigmoid: return body.template operator()<Sigmoid>();
  }
}

}  // namespace krait::kernels::cuda

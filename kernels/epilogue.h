#pragma once
#include "core/dtype.h"
#include "kernels/linear.h"

namespace krait {
namespace kernels {

// The activations of linear.h and their derivatives, for scalar code of CUDA. M gives exp-like functions:
// M::sigmoid, M::erf, M::exp. gelu_tanh is written as x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
template <class A>
inline constexpr A kGeluScale = A(1.5957691216057308);
template <class A>
inline constexpr A kGeluCubic = A(0.044715);

template <class M, Epilogue e, class A>
KRAIT_HOST_DEVICE inline A activate(A x) {
  if constexpr (e == Epilogue::gelu_tanh)
    return x * M::sigmoid(kGeluScale<A> * (x + kGeluCubic<A> * x * x * x));
  else if constexpr (e == Epilogue::gelu_erf)
    return A(0.5) * x * (A(1) + M::erf(x * A(0.70710678118654752)));
  else if constexpr (e == Epilogue::relu)
    return x > A(0) ? x : A(0);
  else
    return x;
}

template <class M, Epilogue e, class A>
KRAIT_HOST_DEVICE inline A derivative(A x) {
  if constexpr (e == Epilogue::gelu_tanh) {
    const A s = M::sigmoid(kGeluScale<A> * (x + kGeluCubic<A> * x * x * x));
    return s + x * s * (A(1) - s) * kGeluScale<A> * (A(1) + A(3) * kGeluCubic<A> * x * x);
  } else if constexpr (e == Epilogue::gelu_erf) {
    return A(0.5) * (A(1) + M::erf(x * A(0.70710678118654752))) +
           x * A(0.39894228040143268) * M::exp(A(-0.5) * x * x);
  } else if constexpr (e == Epilogue::relu) {
    return x > A(0) ? A(1) : A(0);
  } else {
    return A(1);
  }
}

template <class F>
void visit_epilogue(Epilogue e, F&& f) {
  switch (e) {
    case Epilogue::none: return f.template operator()<Epilogue::none>();
    case Epilogue::gelu_tanh: return f.template operator()<Epilogue::gelu_tanh>();
    case Epilogue::gelu_erf: return f.template operator()<Epilogue::gelu_erf>();
    case Epilogue::relu: return f.template operator()<Epilogue::relu>();
  }
}

}  // namespace kernels
}  // namespace krait

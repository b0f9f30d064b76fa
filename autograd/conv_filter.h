#pragma once
#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

/// A convolution's filter in the dtype of sums, converted once for the forward and the backward.
struct ConvFilter {
  Tensor weight, bias;
  ConvFilter(const Variable& w, const Variable& b, DType x)
      : weight(w.data().to(accum_dtype(x))), bias(b.defined() ? b.data().to(accum_dtype(x)) : Tensor()) {}
};

/// A gradient, which may be undefined, in the dtype of what it is the gradient of.
inline Tensor in_dtype_of(const Variable& v, const Tensor& gradient) {
  return gradient.defined() ? gradient.to(v.dtype()) : gradient;
}

}  // namespace autograd
}  // namespace krait

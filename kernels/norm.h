#pragma once
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// Calls f.template operator()<X, R>() for a norm of inputs X over a residual stream R: both equal, or X bf16 and R
/// fp32. Without a residual R is X.
template <class F>
void visit_norm(DType x, DType residual, F&& f) {
  if (x == DType::bf16 && residual == DType::f32) return f.template operator()<bf16, float>();
  visit_float(x, [&]<class T>() { f.template operator()<T, T>(); });
}

/// What rms_norm and layer_norm refuse alike: an empty last dimension, other shapes, dtypes or devices.
/// residual and b may be undefined.
void check_norm(std::string_view op, const Tensor& x, const Tensor& residual, const Tensor& w, const Tensor& b,
                double eps);

/// Where the gradient of a norm's weight or bias goes: sums are made in fp32 (fp64 for fp64).
/// With `into` (a gradient buffer of any floating dtype) the sum is added to it, else a new tensor like `w` results.
class WeightGrad {
 public:
  WeightGrad(const Tensor& w, DType x, const Tensor& into);
  Tensor& sum() { return sum_; }         // what the backend writes or adds to; undefined when w is
  bool adds() const { return adds_; }
  Tensor finish();                       // the new gradient; undefined when it was added to `into`

 private:
  Tensor sum_, into_;
  DType dtype_ = DType::f32;
  bool adds_ = false;
};

}  // namespace kernels
}  // namespace krait

#include "kernels/norm.h"

#include "kernels/accumulate.h"

namespace krait::kernels {

void check_norm(std::string_view op_view, const Tensor& x, const Tensor& residual, const Tensor& w, const Tensor& b,
                double eps) {
  const fmt::string_view op(op_view.data(), op_view.size());
  KRAIT_CHECK(x.ndim() >= 1 && x.size(-1) > 0, "{}: x is empty or a scalar: {}", op, x.shape());
  KRAIT_CHECK(x.dtype() == DType::f32 || x.dtype() == DType::f64 || x.dtype() == DType::bf16,
              "{}: x is {}, expected float32, float64 or bfloat16", op, x.dtype());
  KRAIT_CHECK(eps >= 0, "{}: eps is {}, expected at least 0", op, eps);
  const Shape last{x.size(-1)};
  const auto check_weight = [&](const char* name, const Tensor& t) {
    KRAIT_CHECK(t.shape() == last, "{}: {} is {}, expected {} to match x {}", op, name, t.shape(), last, x.shape());
    KRAIT_CHECK(t.device() == x.device() && (t.dtype() == x.dtype() || t.dtype() == accum_dtype(x.dtype())),
                "{}: {} is {}, x is {}; expected the same device and dtype, or {}", op, name, describe(t), describe(x),
                accum_dtype(x.dtype()));
  };
  check_weight("weight", w);
  if (b.defined()) check_weight("bias", b);
  if (!residual.defined()) return;
  KRAIT_CHECK(residual.shape() == x.shape() && residual.device() == x.device(),
              "{}: residual is {}, expected the shape and device of x, {}", op, describe(residual), describe(x));
  KRAIT_CHECK(residual.dtype() == x.dtype() || residual.dtype() == accum_dtype(x.dtype()),
              "{}: residual is {}, x is {}; expected the same, or a float32 residual with bfloat16 x", op,
              residual.dtype(), x.dtype());
}

WeightGrad::WeightGrad(const Tensor& w, DType x, const Tensor& into) {
  if (!w.defined()) return;
  const DType a = accum_dtype(x);
  dtype_ = w.dtype();
  if (into.defined() && into.dtype() == a && into.is_contiguous() && into.device() == w.device()) {
    sum_ = into;
    adds_ = true;
  } else {
    sum_ = empty(w.shape(), a, w.device());
    into_ = into;
  }
}

Tensor WeightGrad::finish() {
  if (!sum_.defined() || adds_) return {};
  if (!into_.defined()) return sum_.to(dtype_);
  accumulate(into_, sum_);
  return {};
}

}  // namespace krait::kernels

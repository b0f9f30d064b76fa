#include "kernels/grad_norm.h"

namespace krait::kernels {

Tensor sum_squares(const Tensor& x_in) {
  KRAIT_CHECK(is_floating(x_in.dtype()) && x_in.dtype() != DType::f16, "sum_squares: {}", describe(x_in));
  const Tensor x = x_in.contiguous();
  Tensor sums = empty({(x.numel() + kNormChunk - 1) / kNormChunk}, DType::f64, x.device());
  KRAIT_DISPATCH(x.device(), sum_squares(sums, x));
  return sums;
}

GradNorm norm_clip(const Tensor& sums, double max_norm, const Tensor& skipped) {
  KRAIT_CHECK(sums.dtype() == DType::f64 && sums.ndim() == 1, "norm_clip: sums are {}, expected float64 (k)",
              describe(sums));
  KRAIT_CHECK(!skipped.defined() || (skipped.dtype() == DType::i64 && skipped.numel() == 1 &&
                                     skipped.device() == sums.device()),
              "norm_clip: the counter is {}, expected int64 (1) on {}", describe(skipped), sums.device());
  GradNorm out{empty({4}, DType::f64, sums.device())};
  KRAIT_DISPATCH(sums.device(), norm_clip(out.values, sums.contiguous(), max_norm, skipped));
  return out;
}

}  // namespace krait::kernels

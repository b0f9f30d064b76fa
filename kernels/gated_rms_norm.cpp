#include "kernels/gated_rms_norm.h"

#include "kernels/norm.h"
#include "kernels/rows.h"

namespace krait::kernels {

GatedRmsNormOut gated_rms_norm_forward(const Tensor& x, const Tensor& z, const Tensor& w, double eps, int64_t groups,
                                       bool norm_first) {
  check_norm("gated_rms_norm", x, {}, w, {}, eps);
  check_same("gated_rms_norm", x, z);
  KRAIT_CHECK(z.shape() == x.shape(), "gated_rms_norm: z is {}, x is {}; expected the same shape", z.shape(), x.shape());
  KRAIT_CHECK(groups >= 1 && x.size(-1) % groups == 0, "gated_rms_norm: {} groups do not divide {} channels", groups,
              x.size(-1));
  const DType a = accum_dtype(x.dtype());
  const Tensor rows = dense_rows(x).contiguous();
  GatedRmsNormOut out{empty(x.shape(), x.dtype(), x.device()), empty({rows.size(0), groups}, a, x.device())};
  Tensor y = out.y.view(rows.shape());
  KRAIT_DISPATCH(x.device(), gated_rms_norm_forward(y, out.rstd, rows, dense_rows(z), w.to(a).contiguous(), eps, norm_first));
  return out;
}

GatedRmsNormGrad gated_rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& w,
                                         const Tensor& rstd, bool norm_first, const Tensor& dw_into,
                                         const Tensor& dz_into, bool y_again) {
  check_same("gated_rms_norm", x, dy);
  KRAIT_CHECK(dy.shape() == x.shape(), "gated_rms_norm: dy is {}, x is {}", dy.shape(), x.shape());
  const Tensor rows = dense_rows(x).contiguous();
  const auto like_x = [&] { return empty(x.shape(), x.dtype(), x.device()); };
  GatedRmsNormGrad out{like_x(), dz_into.defined() ? dz_into : like_x(), {}, y_again ? like_x() : Tensor()};
  KRAIT_CHECK(out.dz.shape() == x.shape() && out.dz.dtype() == x.dtype() && out.dz.can_view(rows.shape()) &&
                  (out.dz.stride(-1) == 1 || out.dz.size(-1) == 1),
              "gated_rms_norm: dz is {}, expected rows like those of x {}", describe(out.dz), x.shape());
  Tensor dx = out.dx.view(rows.shape()), dz = out.dz.view(rows.shape()), y = y_again ? out.y.view(rows.shape()) : Tensor();
  WeightGrad dw(w, x.dtype(), dw_into);
  KRAIT_DISPATCH(x.device(),
                 gated_rms_norm_backward(dx, dz, y, dw.sum(), dw.adds(), dense_rows(dy).contiguous(), rows, dense_rows(z),
                                         w.to(accum_dtype(x.dtype())).contiguous(), rstd, norm_first));
  out.dw = dw.finish();
  return out;
}

}  // namespace krait::kernels

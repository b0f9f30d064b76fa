#include "kernels/rms_norm.h"

#include "kernels/norm.h"

namespace krait::kernels {

RmsNormOut rms_norm_forward(const Tensor& x_in, const Tensor& w, double eps) {
  check_norm("rms_norm", x_in, {}, w, {}, eps);
  const DType a = accum_dtype(x_in.dtype());
  const Tensor x = x_in.contiguous();
  RmsNormOut out{empty_like(x), empty(x.shape().drop_last(), a, x.device())};
  Tensor no_sum;
  KRAIT_DISPATCH(x.device(), rms_norm_forward(out.y, no_sum, out.rstd, x, Tensor(), w.to(a).contiguous(), eps));
  return out;
}

AddRmsNormOut add_rms_norm_forward(const Tensor& x, const Tensor& residual, const Tensor& w, double eps) {
  check_norm("add_rms_norm", x, residual, w, {}, eps);
  const DType a = accum_dtype(x.dtype());
  AddRmsNormOut out{empty_like(residual), empty_like(x), empty(x.shape().drop_last(), a, x.device())};
  KRAIT_DISPATCH(x.device(), rms_norm_forward(out.y, out.residual, out.rstd, x.contiguous(), residual.contiguous(),
                                              w.to(a).contiguous(), eps));
  return out;
}

RmsNormGrad rms_norm_backward(const Tensor& dy, const Tensor& dr, const Tensor& x_in, const Tensor& w,
                              const Tensor& rstd, const Tensor& dw_into) {
  KRAIT_CHECK(dy.shape() == x_in.shape(), "rms_norm: dy is {}, x is {}", describe(dy), describe(x_in));
  if (dr.defined()) {
    check_same("rms_norm", x_in, dr);
    KRAIT_CHECK(dr.shape() == x_in.shape(), "rms_norm: dr is {}, x is {}", dr.shape(), x_in.shape());
  }
  const Tensor x = x_in.contiguous();
  RmsNormGrad out;
  out.dresidual = empty_like(x);
  if (dy.dtype() != x.dtype()) out.dx = empty_like(dy);
  WeightGrad dw(w, x.dtype(), dw_into);
  KRAIT_DISPATCH(x.device(), rms_norm_backward(out.dresidual, out.dx, dw.sum(), dw.adds(), dy.contiguous(),
                                               dr.defined() ? dr.contiguous() : Tensor(), x,
                                               w.to(accum_dtype(x.dtype())).contiguous(), rstd));
  if (!out.dx.defined()) out.dx = out.dresidual;
  out.dw = dw.finish();
  return out;
}

}  // namespace krait::kernels

#include "kernels/head_norm.h"

#include "kernels/norm.h"

namespace krait::kernels {

HeadNormOut head_norm_forward(const Tensor& x_in, const Tensor& w, double eps) {
  KRAIT_CHECK(x_in.ndim() >= 2 && x_in.size(-1) > 0 && x_in.size(-2) > 0,
              "head_norm: x is {}, expected (..., heads, channels)", x_in.shape());
  const DType a = accum_dtype(x_in.dtype());
  const Shape width{x_in.size(-2) * x_in.size(-1)};
  KRAIT_CHECK(w.shape() == width && w.device() == x_in.device() && (w.dtype() == x_in.dtype() || w.dtype() == a),
              "head_norm: weight is {}, expected {} to match x {}", describe(w), width, describe(x_in));
  KRAIT_CHECK(eps >= 0, "head_norm: eps is {}, expected at least 0", eps);
  const Tensor x = x_in.contiguous();
  const Shape rows = x.shape().drop_last();
  HeadNormOut out{empty_like(x), empty(rows, a, x.device()), empty(rows, a, x.device())};
  if (x.numel() == 0) return out;
  KRAIT_DISPATCH(x.device(), head_norm_forward(out.y, out.mean, out.rstd, x, w.to(a).contiguous(), eps));
  return out;
}

HeadNormGrad head_norm_backward(const Tensor& dy, const Tensor& x_in, const Tensor& w, const Tensor& mean,
                                const Tensor& rstd, const Tensor& dw_into) {
  check_same("head_norm", dy, x_in);
  KRAIT_CHECK(dy.shape() == x_in.shape(), "head_norm: dy is {}, x is {}", dy.shape(), x_in.shape());
  const Tensor x = x_in.contiguous();
  HeadNormGrad out;
  out.dx = empty_like(x);
  WeightGrad dw(w, x.dtype(), dw_into);
  if (x.numel() > 0)
    KRAIT_DISPATCH(x.device(), head_norm_backward(out.dx, dw.sum(), dw.adds(), dy.contiguous(), x,
                                                  w.to(accum_dtype(x.dtype())).contiguous(), mean, rstd));
  else if (!dw.adds())
    zero_(dw.sum());
  out.dw = dw.finish();
  return out;
}

}  // namespace krait::kernels

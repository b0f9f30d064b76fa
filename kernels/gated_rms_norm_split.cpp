#include "kernels/gated_rms_norm_split.h"

#include "kernels/norm.h"
#include "kernels/rows.h"

namespace krait::kernels {

namespace {

// Rows of x and what belongs to them, as the backends want them.
struct Rows {
  Tensor x, z;
  Rows(const Tensor& x_in, const Tensor& z_in, int64_t groups) : x(dense_rows(x_in).contiguous()), z(dense_rows(z_in)) {
    check_same("gated_rms_norm", x_in, z_in);
    KRAIT_CHECK(z_in.shape() == x_in.shape(), "gated_rms_norm: z is {}, x is {}; expected the same shape", z_in.shape(),
                x_in.shape());
    KRAIT_CHECK(groups >= 1 && x.size(1) > 0 && x.size(1) % groups == 0, "gated_rms_norm: {} groups do not divide {} channels",
                groups, x.size(1));
  }
  Tensor statistics(int64_t groups) const { return empty({x.size(0), groups}, accum_dtype(x.dtype()), x.device()); }
  void check(const char* name, const Tensor& t) const {
    KRAIT_CHECK(t.ndim() == 2 && t.size(0) == x.size(0) && t.dtype() == accum_dtype(x.dtype()) && t.is_contiguous(),
                "gated_rms_norm: {} is {}, expected ({}, groups) in the dtype of sums", name, describe(t), x.size(0));
  }
};

Tensor wide(const Tensor& w, const Tensor& x) {
  KRAIT_CHECK(w.shape() == Shape{x.size(-1)}, "gated_rms_norm: weight is {}, expected ({}) to match x {}", w.shape(),
              x.size(-1), x.shape());
  return w.to(accum_dtype(x.dtype())).contiguous();
}

}  // namespace

Tensor gated_rms_norm_squares(const Tensor& x, const Tensor& z, int64_t groups, bool norm_first) {
  const Rows rows(x, z, groups);
  Tensor squares = rows.statistics(groups);
  if (x.numel() > 0) KRAIT_DISPATCH(x.device(), gated_rms_norm_squares(squares, rows.x, rows.z, norm_first));
  return squares;
}

Tensor gated_rms_norm_apply(const Tensor& x, const Tensor& z, const Tensor& w, const Tensor& rstd) {
  const Rows rows(x, z, rstd.size(-1));
  rows.check("rstd", rstd);
  const Tensor out = empty(x.shape(), x.dtype(), x.device());
  Tensor y = out.view(rows.x.shape());
  if (x.numel() > 0) KRAIT_DISPATCH(x.device(), gated_rms_norm_apply(y, rows.x, rows.z, wide(w, x), rstd));
  return out;
}

Tensor gated_rms_norm_dots(const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& w, const Tensor& rstd) {
  check_same("gated_rms_norm", x, dy);
  const Rows rows(x, z, rstd.size(-1));
  rows.check("rstd", rstd);
  Tensor dots = rows.statistics(rstd.size(1));
  if (x.numel() > 0)
    KRAIT_DISPATCH(x.device(), gated_rms_norm_dots(dots, dense_rows(dy).contiguous(), rows.x, rows.z, wide(w, x), rstd));
  return dots;
}

GatedRmsNormGrad gated_rms_norm_backward_split(const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& w,
                                               const Tensor& rstd, const Tensor& mean, bool norm_first,
                                               const Tensor& dw_into, const Tensor& dz_into, bool y_again) {
  check_same("gated_rms_norm", x, dy);
  KRAIT_CHECK(dy.shape() == x.shape(), "gated_rms_norm: dy is {}, x is {}", dy.shape(), x.shape());
  const Rows rows(x, z, rstd.size(-1));
  rows.check("rstd", rstd);
  rows.check("mean", mean);
  const auto like_x = [&] { return empty(x.shape(), x.dtype(), x.device()); };
  GatedRmsNormGrad out{like_x(), dz_into.defined() ? dz_into : like_x(), {}, y_again ? like_x() : Tensor()};
  const Shape shape = rows.x.shape();
  KRAIT_CHECK(out.dz.shape() == x.shape() && out.dz.dtype() == x.dtype() && out.dz.can_view(shape) &&
                  (out.dz.stride(-1) == 1 || out.dz.size(-1) == 1),
              "gated_rms_norm: dz is {}, expected rows like those of x {}", describe(out.dz), x.shape());
  Tensor dx = out.dx.view(shape), dz = out.dz.view(shape), y = y_again ? out.y.view(shape) : Tensor();
  WeightGrad dw(w, x.dtype(), dw_into);
  if (x.numel() == 0) {
    if (!dw.adds()) zero_(dw.sum());
  } else {
    KRAIT_DISPATCH(x.device(),
                   gated_rms_norm_backward_split(dx, dz, y, dw.sum(), dw.adds(), dense_rows(dy).contiguous(), rows.x,
                                                 rows.z, wide(w, x), rstd, mean, norm_first));
  }
  out.dw = dw.finish();
  return out;
}

}  // namespace krait::kernels

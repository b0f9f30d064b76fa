#include "kernels/layer_norm.h"

#include "kernels/norm.h"

namespace krait::kernels {

namespace {
Tensor packed(const Tensor& t, DType dtype) { return t.defined() ? t.to(dtype).contiguous() : t; }
}  // namespace

LayerNormOut layer_norm_forward(const Tensor& x_in, const Tensor& w, const Tensor& b, double eps, double weight_offset) {
  check_norm("layer_norm", x_in, {}, w, b, eps);
  const DType a = accum_dtype(x_in.dtype());
  const Tensor x = x_in.contiguous();
  const Shape rows = x.shape().drop_last();
  LayerNormOut out{empty_like(x), empty(rows, a, x.device()), empty(rows, a, x.device())};
  Tensor no_sum;
  KRAIT_DISPATCH(x.device(), layer_norm_forward(out.y, no_sum, out.mean, out.rstd, x, Tensor(), packed(w, a),
                                                packed(b, a), eps, weight_offset));
  return out;
}

AddLayerNormOut add_layer_norm_forward(const Tensor& x, const Tensor& residual, const Tensor& w, const Tensor& b,
                                       double eps, double weight_offset) {
  check_norm("add_layer_norm", x, residual, w, b, eps);
  const DType a = accum_dtype(x.dtype());
  const Shape rows = x.shape().drop_last();
  AddLayerNormOut out{empty_like(residual), empty_like(x), empty(rows, a, x.device()), empty(rows, a, x.device())};
  KRAIT_DISPATCH(x.device(), layer_norm_forward(out.y, out.residual, out.mean, out.rstd, x.contiguous(),
                                                residual.contiguous(), packed(w, a), packed(b, a), eps, weight_offset));
  return out;
}

LayerNormGrad layer_norm_backward(const Tensor& dy, const Tensor& dr, const Tensor& x_in, const Tensor& w,
                                  const Tensor& b, const Tensor& mean, const Tensor& rstd, const Tensor& dw_into,
                                  const Tensor& db_into, double weight_offset) {
  KRAIT_CHECK(dy.shape() == x_in.shape(), "layer_norm: dy is {}, x is {}", describe(dy), describe(x_in));
  if (dr.defined()) {
    check_same("layer_norm", x_in, dr);
    KRAIT_CHECK(dr.shape() == x_in.shape(), "layer_norm: dr is {}, x is {}", dr.shape(), x_in.shape());
  }
  const Tensor x = x_in.contiguous();
  LayerNormGrad out;
  out.dresidual = empty_like(x);
  if (dy.dtype() != x.dtype()) out.dx = empty_like(dy);
  WeightGrad dw(w, x.dtype(), dw_into), db(b, x.dtype(), db_into);
  KRAIT_DISPATCH(x.device(), layer_norm_backward(out.dresidual, out.dx, dw.sum(), dw.adds(), db.sum(), db.adds(),
                                                 dy.contiguous(), dr.defined() ? dr.contiguous() : Tensor(), x,
                                                 packed(w, accum_dtype(x.dtype())), mean, rstd, weight_offset));
  if (!out.dx.defined()) out.dx = out.dresidual;
  out.dw = dw.finish();
  out.db = db.finish();
  return out;
}

}  // namespace krait::kernels

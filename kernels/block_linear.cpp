#include "kernels/block_linear.h"

#include "kernels/norm.h"
#include "kernels/rows.h"

namespace krait::kernels {

namespace {

void check_sizes(const Tensor& x, const Tensor& w) {
  check_same("block_linear", x, w);
  KRAIT_CHECK(w.ndim() == 3 && x.ndim() >= 1 && x.size(-1) == w.size(0) * w.size(2),
              "block_linear: x is {}, weight {} (blocks, out, in)", x.shape(), w.shape());
  KRAIT_CHECK(w.size(1) >= 1 && w.size(2) >= 1 && w.size(1) <= kMaxBlockSide && w.size(2) <= kMaxBlockSide,
              "block_linear: blocks of {} x {}, expected sides of 1 to {}", w.size(1), w.size(2), kMaxBlockSide);
}

}  // namespace

Tensor block_linear_forward(const Tensor& x, const Tensor& w) {
  check_sizes(x, w);
  Tensor y = empty(x.shape().with(-1, w.size(0) * w.size(1)), x.dtype(), x.device());
  if (y.numel() == 0) return y;
  Tensor rows = y.flatten_leading();
  KRAIT_DISPATCH(x.device(), block_linear_forward(rows, dense_rows(x), w.contiguous()));
  return y;
}

BlockLinearGrad block_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& w, bool want_dx, bool want_dw,
                                      const Tensor& dw_sum) {
  check_sizes(x, w);
  check_same("block_linear", dy, x);
  KRAIT_CHECK(dy.shape() == x.shape().with(-1, w.size(0) * w.size(1)), "block_linear: dy is {} for x {}", dy.shape(),
              x.shape());
  BlockLinearGrad out;
  if (want_dx) out.dx = empty(x.shape(), x.dtype(), x.device());
  Tensor dx = want_dx ? out.dx.flatten_leading() : Tensor{}, none;
  if (!want_dw) {
    if (x.numel() > 0)
      KRAIT_DISPATCH(x.device(), block_linear_backward(dx, none, false, dense_rows(dy), dense_rows(x), w.contiguous()));
    return out;
  }
  WeightGrad dw(w, x.dtype(), dw_sum);
  if (x.numel() > 0)
    KRAIT_DISPATCH(x.device(), block_linear_backward(dx, dw.sum(), dw.adds(), dense_rows(dy), dense_rows(x), w.contiguous()));
  else if (!dw.adds())
    zero_(dw.sum());
  out.dw = dw.finish();
  return out;
}

}  // namespace krait::kernels

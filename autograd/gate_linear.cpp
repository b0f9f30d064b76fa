#include "autograd/gate_linear.h"

#include "kernels/matmul.h"

namespace krait::autograd {

Variable gate_linear(const Variable& x, const Variable& w) {
  KRAIT_CHECK(x.ndim() >= 1 && w.ndim() == 2 && x.size(-1) == w.size(1), "gate_linear: x {} does not fit w {}",
              x.shape(), w.shape());
  const Tensor rows = x.data().flatten_leading();
  Tensor y = empty({rows.size(0), w.size(0)}, accum_dtype(x.dtype()), x.device());
  kernels::matmul_out(y, rows, w.data(), false, true);
  return record("gate_linear", {x, w}, y.view(x.shape().drop_last().append(w.size(0))),
                [x, w, rows, weight = w.data()](const Tensor& dy) -> Grads {
                  const Tensor d = dy.flatten_leading().to(rows.dtype());
                  Tensor dx, dw;
                  if (x.requires_grad()) dx = kernels::matmul(d, weight).view(x.shape());
                  if (w.requires_grad()) {
                    const bool in_place = w.accumulates_in_place();
                    dw = in_place ? w.grad() : empty_like(weight);
                    kernels::matmul_out(dw, d, rows, true, false, 1.0, in_place ? 1.0 : 0.0);
                    if (in_place) dw = {};
                  }
                  return {dx, dw};
                });
}

}  // namespace krait::autograd

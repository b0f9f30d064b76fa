#include "autograd/gate_linear.h"

#include "kernels/matmul.h"

namespace krait::autograd {

Variable gate_linear(const Variable& x, const Variable& w) { return gate_linear(Vars{x}, w); }

Variable gate_linear(const Vars& parts, const Variable& w) {
  KRAIT_CHECK(!parts.empty() && w.ndim() == 2, "gate_linear: {} parts, w {}", parts.size(), w.shape());
  std::vector<Tensor> rows, weights;
  int64_t at = 0;
  for (const Variable& x : parts) {
    KRAIT_CHECK(x.ndim() >= 1 && x.shape().drop_last() == parts[0].shape().drop_last() && at + x.size(-1) <= w.size(1),
                "gate_linear: x {} does not fit w {}", x.shape(), w.shape());
    rows.push_back(x.data().flatten_leading());
    weights.push_back(w.data().slice(1, at, at + x.size(-1)));
    at += x.size(-1);
  }
  KRAIT_CHECK(at == w.size(1), "gate_linear: x has {} columns, w is {}", at, w.shape());
  Tensor y = empty({rows[0].size(0), w.size(0)}, accum_dtype(w.dtype()), w.device());
  for (size_t i = 0; i < rows.size(); ++i) kernels::matmul_out(y, rows[i], weights[i], false, true, 1.0, i > 0 ? 1.0 : 0.0);
  Vars inputs = parts;
  inputs.push_back(w);
  return record("gate_linear", inputs, y.view(parts[0].shape().drop_last().append(w.size(0))),
                [parts, w, rows, weights](const Tensor& dy) -> Grads {
                  const Tensor d = dy.flatten_leading().to(w.dtype());
                  const bool in_place = w.accumulates_in_place();
                  Tensor dw;
                  if (w.requires_grad()) dw = in_place ? w.grad() : empty_like(w.data());
                  Grads grads;
                  int64_t first = 0;
                  for (size_t i = 0; i < rows.size(); ++i) {
                    const int64_t end = first + rows[i].size(1);
                    grads.push_back(parts[i].requires_grad() ? kernels::matmul(d, weights[i]).view(parts[i].shape())
                                                             : Tensor{});
                    if (dw.defined()) {
                      Tensor columns = dw.slice(1, first, end);
                      kernels::matmul_out(columns, d, rows[i], true, false, 1.0, in_place ? 1.0 : 0.0);
                    }
                    first = end;
                  }
                  grads.push_back(in_place ? Tensor{} : dw);
                  return grads;
                });
}

}  // namespace krait::autograd

#include "autograd/recurrent.h"

#include "autograd/linear.h"
#include "autograd/shape.h"

namespace krait::autograd {

RecurrentOut recurrent(kernels::RecurrentCell cell, const Variable& x, const Variable& w_ih, const Variable& w_hh,
                       const Variable& b_ih, const Variable& b_hh, const Variable& state, const Tensor& segments) {
  const auto name = kernels::name_of(cell);
  const fmt::string_view shown(name.data(), name.size());
  const int64_t gates = kernels::gates_of(cell), p = w_hh.size(-1);
  KRAIT_CHECK(x.ndim() == 3, "{}: x is {}, expected (b, l, channels)", shown, x.shape());
  KRAIT_CHECK(w_hh.shape() == (Shape{gates * p, p}) && w_ih.shape() == (Shape{gates * p, x.size(2)}) &&
                  b_hh.shape() == Shape{gates * p},
              "{}: w_ih is {}, w_hh {}, b_hh {}; expected (g h, {}), (g h, h), (g h) with g = {}", shown, w_ih.shape(),
              w_hh.shape(), b_hh.shape(), x.size(2), gates);
  const Variable pre = reshape(linear(x, w_ih, b_ih), {x.size(0), x.size(1), gates, 1, p});
  const Shape w_shape{1, gates, p, p}, b_shape{gates, 1, p};
  const Tensor weight = w_hh.data().contiguous().view(w_shape);
  const bool save = wants_grad({pre, w_hh, b_hh, state});
  const auto out = kernels::recurrent_forward(cell, pre.data(), weight, b_hh.data().reshape(b_shape), state.data(),
                                              segments, save);
  const Vars y = record(name, {pre, w_hh, b_hh, state}, {out.y, out.state},
                        [cell, out, weight, w_hh, b_hh, segments, w_shape, b_shape,
                         want = state.requires_grad()](const std::vector<Tensor>& d) -> Grads {
                          const auto buffer = [](const Variable& v, const Shape& shape) {
                            return v.accumulates_in_place() ? v.grad().view(shape) : Tensor();
                          };
                          auto g = kernels::recurrent_backward(cell, d[0], d[1], weight, out, segments, want,
                                                               buffer(w_hh, w_shape), buffer(b_hh, b_shape));
                          if (g.dw.defined()) g.dw = g.dw.view(w_hh.shape());
                          if (g.dbias.defined()) g.dbias = g.dbias.view(b_hh.shape()).to(b_hh.dtype());
                          return {g.dx, g.dw, g.dbias, g.dstate};
                        });
  return {reshape(y[0], {x.size(0), x.size(1), p}), y[1]};
}

}  // namespace krait::autograd

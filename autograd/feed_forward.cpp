#include "autograd/feed_forward.h"

#include "kernels/feed_forward.h"

namespace krait::autograd {

namespace {

struct Maps {
  Variable w_in, b_in, w_out, b_out;
  Tensor in, out;  // the weights' values, as they were in the forward pass
};

// A gradient that went straight into the leaf's buffer is reported as undefined.
Tensor unless_summed(const Tensor& gradient, const Variable& v) { return v.accumulates_in_place() ? Tensor{} : gradient; }

// units(dy) gives the gradient of pre and, where `units_sum_b_in`, has added up that of b_in.
template <class Units>
Grads gradients(const Tensor& dy, const Tensor& x, bool want_dx, const Tensor& h, const Maps& m, bool units_sum_b_in,
                Units units) {
  Grads grads(5);
  const kernels::LinearWants outer{false, m.w_out.requires_grad(), m.b_out.requires_grad()};
  const auto out = kernels::linear_backward(dy, h, m.out, {}, Epilogue::none, outer, m.w_out.grad_in_place(),
                                            m.b_out.grad_in_place());
  grads[3] = unless_summed(out.dw, m.w_out);
  grads[4] = unless_summed(out.db, m.b_out);
  const kernels::LinearWants inner{want_dx, m.w_in.requires_grad(), !units_sum_b_in && m.b_in.requires_grad()};
  if (!inner.dx && !inner.dw && !m.b_in.requires_grad()) return grads;
  const kernels::UnitsGrad between = units(dy);
  const auto in = kernels::linear_backward(between.dpre, x, m.in, {}, Epilogue::none, inner, m.w_in.grad_in_place(),
                                           m.b_in.grad_in_place());
  grads[0] = in.dx;
  grads[1] = unless_summed(in.dw, m.w_in);
  grads[2] = unless_summed(units_sum_b_in ? between.db : in.db, m.b_in);
  return grads;
}

}  // namespace

Variable feed_forward(const Variable& x, const Variable& w_in, const Variable& b_in, const Variable& w_out,
                      const Variable& b_out, Epilogue epilogue) {
  const bool tape = wants_grad({x, w_in, b_in, w_out, b_out});
  const auto [h, pre] = kernels::linear_forward(x.data(), w_in.data(), b_in.data(), epilogue, tape);
  const Tensor y = kernels::linear_forward(h, w_out.data(), b_out.data(), Epilogue::none, false).y;
  return record("feed_forward", {x, w_in, b_in, w_out, b_out}, y,
                [x = x.data(), want_dx = x.requires_grad(), h = h, pre = pre, epilogue,
                 m = Maps{w_in, b_in, w_out, b_out, w_in.data(), w_out.data()}](const Tensor& dy) -> Grads {
                  return gradients(dy, x, want_dx, h, m, true, [&](const Tensor& d) {
                    return kernels::units_backward(d, m.out, pre, epilogue, m.b_in.requires_grad(),
                                                   m.b_in.grad_in_place());
                  });
                });
}

Variable swiglu_feed_forward(const Variable& x, const Variable& w_in, const Variable& b_in, const Variable& w_out,
                             const Variable& b_out) {
  const auto [h, pre] = kernels::gated_units_forward(x.data(), w_in.data(), b_in.data());
  const Tensor y = kernels::linear_forward(h, w_out.data(), b_out.data(), Epilogue::none, false).y;
  return record("swiglu_feed_forward", {x, w_in, b_in, w_out, b_out}, y,
                [x = x.data(), want_dx = x.requires_grad(), h = h, pre = pre,
                 m = Maps{w_in, b_in, w_out, b_out, w_in.data(), w_out.data()}](const Tensor& dy) -> Grads {
                  return gradients(dy, x, want_dx, h, m, false, [&](const Tensor& d) {
                    return kernels::UnitsGrad{kernels::gated_units_backward(d, m.out, pre), {}};
                  });
                });
}

}  // namespace krait::autograd

#include "kernels/recurrent_step.h"

#include "kernels/linear.h"

namespace krait::kernels {

namespace {

Tensor composed(RecurrentCell cell, Tensor& state, const Tensor& x, const RecurrentStepWeights& w) {
  const int64_t b = x.size(0), gates = gates_of(cell), p = w.w_hh.size(1);
  const Tensor pre = linear_forward(x, w.w_ih, w.b_ih, Epilogue::none, false).y;
  const RecurrenceOut out = recurrent_forward(cell, pre.view({b, 1, gates, 1, p}), w.w_hh.view({1, gates, p, p}), w.b_hh.view({gates, 1, p}),
                                              state.transpose(0, 1).contiguous(), {}, false);
  copy_(state, out.state.transpose(0, 1));
  return out.y.view({b, p});
}

}  // namespace

Tensor recurrent_step(RecurrentCell cell, Tensor& state, const Tensor& x, const RecurrentStepWeights& w) {
  const std::string op = std::string(name_of(cell)) + "_step";
  const int64_t gates = gates_of(cell);
  check_same(op, x, w.w_ih, w.w_hh);
  check_same(op, x, w.b_ih, w.b_hh);
  KRAIT_CHECK(x.ndim() == 2 && w.w_hh.ndim() == 2, "{}: x is {}, the recurrent weight {}", op, x.shape(), w.w_hh.shape());
  const int64_t b = x.size(0), p = w.w_hh.size(1);
  const DType a = accum_dtype(x.dtype());
  const Shape bias{gates * p};
  KRAIT_CHECK(w.w_hh.shape() == (Shape{gates * p, p}) && w.w_ih.shape() == (Shape{gates * p, x.size(1)}) && w.b_ih.shape() == bias && w.b_hh.shape() == bias,
              "{}: x is {}, w_ih {}, w_hh {}, b_ih {}, b_hh {}; expected {} times as many rows as units", op, x.shape(), w.w_ih.shape(),
              w.w_hh.shape(), w.b_ih.shape(), w.b_hh.shape(), gates);
  KRAIT_CHECK(state.shape() == (Shape{b, states_of(cell), 1, p}) && state.dtype() == a && state.device() == x.device() && state.is_contiguous(),
              "{}: the state is {}, expected contiguous {} {}", op, describe(state), name_of(a), Shape{b, states_of(cell), 1, p});
  const RecurrentStepWeights whole{w.w_ih.contiguous(), w.w_hh.contiguous(), w.b_ih.contiguous(), w.b_hh.contiguous()};
  const Tensor input = x.contiguous();
  Tensor y = empty({b, p}, x.dtype(), x.device());
  bool done = y.numel() == 0;
  if (!done && x.numel() > 0) KRAIT_DISPATCH_GPU(x.device(), recurrent_step(done, y, state, input, whole, cell));
  return done ? y : composed(cell, state, input, whole);
}

}  // namespace krait::kernels

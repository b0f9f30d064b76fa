#include "kernels/recurrence.h"

#include "kernels/accumulate.h"
#include "kernels/linear.h"

namespace krait::kernels {

RecurrenceForward begin_recurrence(std::string_view op_view, CellSizes cell, const Tensor& x, const Tensor& w,
                                   const Tensor& bias, const Tensor& state0, const Tensor& segments, bool save) {
  const fmt::string_view op(op_view.data(), op_view.size());
  check_same(op_view, x, w);
  KRAIT_CHECK(is_floating(x.dtype()) && x.dtype() != DType::f16,
              "{}: x is {}, expected float32, float64 or bfloat16", op, x.dtype());
  KRAIT_CHECK(x.ndim() == 5 && x.size(2) == cell.gates, "{}: x is {}, expected (b, l, {}, heads, units)", op,
              x.shape(), cell.gates);
  const int64_t b = x.size(0), l = x.size(1), h = x.size(3), p = x.size(4);
  const DType a = accum_dtype(x.dtype());
  const Shape w_shape{h, cell.gates, p, p}, bias_shape{cell.gates, h, p}, state_shape{cell.states, b, h, p};
  KRAIT_CHECK(w.shape() == w_shape, "{}: the recurrent weight is {}, expected {} to match x {}", op, w.shape(), w_shape,
              x.shape());
  KRAIT_CHECK(bias.shape() == bias_shape && bias.device() == x.device(), "{}: bias is {}, expected {} to match x {}", op,
              describe(bias), bias_shape, x.shape());
  if (state0.defined())
    KRAIT_CHECK(state0.shape() == state_shape && state0.dtype() == a && state0.device() == x.device(),
                "{}: the state is {}, expected {} {} on the device of x {}", op, describe(state0), a, state_shape,
                describe(x));
  if (segments.defined())
    KRAIT_CHECK(segments.shape() == (Shape{b, l}) && segments.dtype() == DType::i32 && segments.device() == x.device(),
                "{}: segments are {}, expected int32 {} on the device of x", op, describe(segments), Shape{b, l});
  RecurrenceForward r{x.contiguous(), w.contiguous(), bias.to(a).contiguous(), {}, {}, {}};
  if (state0.defined()) r.state0 = state0.contiguous();
  if (segments.defined()) r.segments = segments.contiguous();
  const Shape y{b, l, h, p};
  r.out.y = empty(y, x.dtype(), x.device());
  r.out.state = empty(state_shape, a, x.device());
  if (save) {
    r.out.saved = empty({b, l, cell.saved, h, p}, a, x.device());
    r.out.y_prev = empty(y, x.dtype(), x.device());
  }
  return r;
}

namespace {

void copy_or_zero(Tensor& to, const Tensor& from) {
  if (!to.defined()) return;
  if (from.defined())
    copy_(to, from);
  else
    zero_(to);
}

}  // namespace

bool finish_empty(RecurrenceForward& r) {
  if (r.x.numel() > 0) return false;
  copy_or_zero(r.out.state, r.state0);
  return true;
}

bool finish_empty(RecurrenceBackward& r) {
  if (r.dx.numel() > 0) return false;
  copy_or_zero(r.dstate0, r.dstate);
  return true;
}

RecurrenceBackward begin_recurrence_backward(CellSizes cell, const Tensor& dy, const Tensor& dstate, const Tensor& w,
                                             const RecurrenceOut& out, const Tensor& segments, bool want_dstate0) {
  const Shape& y = out.y_prev.shape();
  RecurrenceBackward r;
  if (dy.defined()) r.dy = dy.contiguous();
  if (dstate.defined()) r.dstate = dstate.contiguous();
  r.w = w.contiguous();
  r.saved = out.saved;
  if (segments.defined()) r.segments = segments.contiguous();
  r.dx = empty({y[0], y[1], cell.gates, y[2], y[3]}, out.y_prev.dtype(), w.device());
  if (cell.splits) r.dr = empty_like(r.dx);
  if (want_dstate0) r.dstate0 = empty({cell.states, y[0], y[2], y[3]}, accum_dtype(w.dtype()), w.device());
  return r;
}

RecurrenceGrad finish_recurrence_backward(const RecurrenceBackward& r, const Tensor& y_prev, const Tensor& dw_into,
                                          const Tensor& dbias_into) {
  const Tensor dr = r.dr.defined() ? r.dr : r.dx;
  const int64_t n = dr.size(0) * dr.size(1), g = dr.size(2), h = dr.size(3), p = dr.size(4);
  RecurrenceGrad out;
  out.dx = r.dx;
  out.dstate = r.dstate0;
  const bool adds = dw_into.defined();
  Tensor dw = adds ? dw_into : empty(r.w.shape(), r.w.dtype(), r.w.device());
  if (h == 1) {  // all gates in one product
    Tensor flat = dw.view({g * p, p});
    matmul_out(flat, dr.view({n, g * p}), y_prev.view({n, p}), true, false, 1.0, adds ? 1.0 : 0.0);
  } else {
    matmul_out(dw, dr.view({n, g, h, p}).permute({2, 1, 0, 3}), y_prev.view({n, h, p}).permute({1, 0, 2}).unsqueeze(1),
               true, false, 1.0, adds ? 1.0 : 0.0);
  }
  if (!adds) out.dw = dw;
  const DType a = accum_dtype(dr.dtype());
  const bool direct = dbias_into.defined() && dbias_into.dtype() == a && dbias_into.is_contiguous();
  Tensor dbias = direct ? dbias_into.view({g * h * p}) : zeros({g * h * p}, a, dr.device()), none;
  if (n > 0)
    KRAIT_DISPATCH(dr.device(), linear_gradient(none, dbias, dr.view({n, g * h * p}), Tensor(), Epilogue::none, true));
  if (!dbias_into.defined()) {
    out.dbias = dbias.view({g, h, p});
  } else if (!direct) {
    Tensor into = dbias_into;
    accumulate(into, dbias.view(into.shape()));
  }
  return out;
}

}  // namespace krait::kernels

#include "kernels/activation.h"

namespace krait::kernels {

namespace {

// (..., f) as (r, f) with contiguous rows; a view where the strides allow one.
Tensor as_rows(const Tensor& t) {
  const Shape rows{t.numel() / t.size(-1), t.size(-1)};
  return t.stride(-1) == 1 && t.can_view(rows) ? t.view(rows) : t.contiguous().view(rows);
}

void check_gated(const Tensor& gate, const Tensor& up) {
  check_same("glu", gate, up);
  KRAIT_CHECK(gate.ndim() >= 1 && gate.shape() == up.shape(), "glu: gate is {}, up is {}", gate.shape(), up.shape());
}

// The gated pair as rows with one row stride.
std::pair<Tensor, Tensor> paired_rows(const Tensor& gate, const Tensor& up) {
  Tensor g = as_rows(gate), u = as_rows(up);
  if (g.stride(0) != u.stride(0)) return {g.contiguous(), u.contiguous()};
  return {g, u};
}

int64_t half_width(const Tensor& x) {
  KRAIT_CHECK(x.ndim() >= 1 && x.size(-1) % 2 == 0, "glu: x is {}, expected an even last dimension [gate; up]",
              x.shape());
  return x.size(-1) / 2;
}

}  // namespace

Tensor activation_forward(const Tensor& x, Activation f) {
  Tensor y = empty_like(x);
  if (x.numel() > 0) KRAIT_DISPATCH(x.device(), activation_forward(y, x.contiguous(), f));
  return y;
}

Tensor activation_backward(const Tensor& dy, const Tensor& x, Activation f) {
  check_same("activation", dy, x);
  KRAIT_CHECK(dy.shape() == x.shape(), "activation: dy is {}, x is {}", dy.shape(), x.shape());
  Tensor dx = empty_like(x);
  if (x.numel() > 0) KRAIT_DISPATCH(x.device(), activation_backward(dx, dy.contiguous(), x.contiguous(), f));
  return dx;
}

Tensor glu_forward(const Tensor& gate, const Tensor& up, Activation f) {
  check_gated(gate, up);
  Tensor y = empty_like(gate);
  if (y.numel() == 0) return y;
  const auto [g, u] = paired_rows(gate, up);
  Tensor rows = y.view(g.shape());
  KRAIT_DISPATCH(y.device(), glu_forward(rows, g, u, f));
  return y;
}

GluGrad glu_backward(const Tensor& dy, const Tensor& gate, const Tensor& up, Activation f) {
  check_gated(gate, up);
  check_same("glu", gate, dy);
  KRAIT_CHECK(dy.shape() == gate.shape(), "glu: dy is {}, gate is {}", dy.shape(), gate.shape());
  GluGrad out{empty_like(gate), empty_like(up)};
  if (dy.numel() == 0) return out;
  const auto [g, u] = paired_rows(gate, up);
  Tensor dgate = out.dgate.view(g.shape()), dup = out.dup.view(g.shape());
  KRAIT_DISPATCH(dy.device(), glu_backward(dgate, dup, dy.contiguous().view(g.shape()), g, u, f));
  return out;
}

Tensor glu_packed_forward(const Tensor& x, Activation f, bool gate_last) {
  const int64_t width = half_width(x);
  const Tensor first = x.slice(-1, 0, width), last = x.slice(-1, width, 2 * width);
  return gate_last ? glu_forward(last, first, f) : glu_forward(first, last, f);
}

Tensor glu_packed_backward(const Tensor& dy, const Tensor& x, Activation f, bool gate_last) {
  const int64_t width = half_width(x);
  check_same("glu", x, dy);
  KRAIT_CHECK(dy.shape() == x.shape().with(-1, width), "glu: dy is {}, x is {}", dy.shape(), x.shape());
  Tensor dx = empty_like(x);
  if (dy.numel() == 0) return dx;
  const Tensor rows = as_rows(x);
  const int64_t r = rows.size(0);
  const Tensor out = dx.view({r, 2 * width});
  const auto half = [&](const Tensor& t, bool last) { return t.slice(1, last ? width : 0, last ? 2 * width : width); };
  Tensor dgate = half(out, gate_last), dup = half(out, !gate_last);
  KRAIT_DISPATCH(dy.device(), glu_backward(dgate, dup, dy.contiguous().view({r, width}), half(rows, gate_last),
                                           half(rows, !gate_last), f));
  return dx;
}

}  // namespace krait::kernels

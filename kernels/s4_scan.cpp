#include "kernels/s4_scan.h"

#include "kernels/reduce.h"

namespace krait::kernels {

namespace {

Tensor contiguous_or_none(const Tensor& t) { return t.defined() ? t.contiguous() : Tensor(); }

S4System contiguous(const S4System& s) {
  return {s.A.contiguous(),         s.B.contiguous(),         s.C.contiguous(),
          contiguous_or_none(s.D), contiguous_or_none(s.M), contiguous_or_none(s.Q)};
}

void check_inputs(const char* op, const Tensor& u, const S4System& s, const Shape& matrix, const Shape& vector,
                  const Tensor& x0, const Tensor& segments) {
  const DType a = accum_dtype(u.dtype());
  const auto check_one = [&](const char* name, const Tensor& t, const Shape& shape) {
    KRAIT_CHECK(t.shape() == shape && t.dtype() == a && t.device() == u.device(),
                "{}: {} is {}, expected {} {} on {} with u {}", op, name, describe(t), name_of(a), shape, u.device(),
                describe(u));
  };
  check_one("A", s.A, matrix);
  check_one("B", s.B, vector);
  check_one("C", s.C, vector);
  if (s.D.defined()) check_one("D", s.D, {u.size(2)});
  if (x0.defined()) check_one("x0", x0, vector.inserted(0, u.size(0)));
  if (s.M.defined() || s.Q.defined()) {
    KRAIT_CHECK(s.M.defined() && s.Q.defined() && s.M.ndim() == 4, "{}: M and Q are (h, r, n, 2), both or neither", op);
    const Shape low_rank{matrix[0], s.M.size(1), matrix[1], 2};
    check_one("M", s.M, low_rank);
    check_one("Q", s.Q, low_rank);
  }
  KRAIT_CHECK(!segments.defined() || (segments.shape() == u.shape().drop_last() && segments.dtype() == DType::i32 &&
                                      segments.device() == u.device()),
              "{}: segments are {}, expected int32 {} on {}", op, segments.defined() ? describe(segments) : "undefined",
              u.shape().drop_last(), u.device());
}

void check_diagonal(const Tensor& u, const S4System& s, const Tensor& x0, const Tensor& segments) {
  KRAIT_CHECK(u.ndim() == 3, "s4_scan: u is {}, expected (batch, length, channels)", u.shape());
  KRAIT_CHECK(s.A.ndim() == 3 && s.A.size(1) >= 1, "s4_scan: A is {}, expected ({}, states, 2)", s.A.shape(), u.size(2));
  const Shape shape{u.size(2), s.A.size(1), 2};
  check_inputs("s4_scan", u, s, shape, shape, x0, segments);
}

// x0 as the backends take it.
Tensor start(const Tensor& x0, const Tensor& u, const Shape& vector) {
  return x0.defined() ? x0.contiguous() : zeros(vector.inserted(0, u.size(0)), accum_dtype(u.dtype()), u.device());
}

}  // namespace

S4ScanOut s4_scan_forward(const Tensor& u, const S4System& s, const Tensor& x0, const Tensor& segments) {
  check_diagonal(u, s, x0, segments);
  const Tensor first = start(x0, u, s.A.shape());
  if (u.numel() == 0) return {empty(u.shape(), u.dtype(), u.device()), first.clone()};
  S4ScanOut out{empty(u.shape(), u.dtype(), u.device()), empty_like(first)};
  KRAIT_DISPATCH(u.device(), s4_scan_forward(out.y, out.last, u.contiguous(), contiguous(s), first,
                                             contiguous_or_none(segments)));
  return out;
}

S4ScanGrad s4_scan_backward(const Tensor& dy, const Tensor& dlast, const Tensor& u, const S4System& s,
                            const Tensor& x0, const Tensor& segments) {
  check_diagonal(u, s, x0, segments);
  KRAIT_CHECK(!s.M.defined(), "s4_scan: the low-rank form has no gradient");
  const Tensor first = start(x0, u, s.A.shape());
  const Tensor g = dy.defined() ? dy.contiguous() : zeros(u.shape(), u.dtype(), u.device());
  const Tensor glast = dlast.defined() ? dlast.contiguous() : zeros_like(first);
  KRAIT_CHECK(g.shape() == u.shape() && g.dtype() == u.dtype(), "s4_scan: dy is {}, u is {}", describe(g), describe(u));
  const Shape rows{u.size(0), u.size(2)};
  S4ScanGrad grad{empty(u.shape(), u.dtype(), u.device()), zeros_like(first), zeros_like(first), zeros_like(first),
                  s.D.defined() ? zeros(rows, first.dtype(), u.device()) : Tensor(), empty_like(first)};
  if (u.numel() == 0)
    copy_(grad.dx0, glast);
  else
    KRAIT_DISPATCH(u.device(), s4_scan_backward(grad, g, glast, u.contiguous(), contiguous(s), first,
                                                contiguous_or_none(segments)));
  for (Tensor* t : {&grad.dA, &grad.dB, &grad.dC}) *t = sum_to(*t, s.A.shape());
  if (s.D.defined()) grad.dD = sum_to(grad.dD, s.D.shape());
  return grad;
}

S4ScanOut dense_scan_forward(const Tensor& u, const S4System& s, const Tensor& x0, const Tensor& segments) {
  KRAIT_CHECK(u.ndim() == 3, "dense_scan: u is {}, expected (batch, length, channels)", u.shape());
  KRAIT_CHECK(s.A.ndim() == 3 && s.A.size(1) >= 1, "dense_scan: A is {}, expected ({}, states, states)", s.A.shape(),
              u.size(2));
  const int64_t n = s.A.size(1);
  check_inputs("dense_scan", u, s, {u.size(2), n, n}, {u.size(2), n}, x0, segments);
  const Tensor first = start(x0, u, s.B.shape());
  if (u.numel() == 0) return {empty(u.shape(), u.dtype(), u.device()), first.clone()};
  S4ScanOut out{empty(u.shape(), u.dtype(), u.device()), empty_like(first)};
  S4System system = s;
  system.A = s.A.transpose(1, 2);
  KRAIT_DISPATCH(u.device(), dense_scan_forward(out.y, out.last, u.contiguous(), contiguous(system), first,
                                                contiguous_or_none(segments)));
  return out;
}

}  // namespace krait::kernels

#include "kernels/s4_step.h"

namespace krait::kernels {

namespace {

Tensor composed(Tensor& x, const Tensor& u, const S4System& s, std::optional<Activation> f) {
  const int64_t b = u.size(0), h = u.size(1), rows = s.A.size(0);
  const Tensor repeated = u.unsqueeze(1).expand({b, rows / h, h}).reshape({b, 1, rows});
  const S4ScanOut out = s4_scan_forward(repeated, s, x);
  copy_(x, out.last);
  return (f ? activation_forward(out.y, *f) : out.y).squeeze(1);
}

}  // namespace

Tensor s4_step(Tensor& x, const Tensor& u, const S4System& s, std::optional<Activation> f) {
  const DType a = accum_dtype(u.dtype());
  KRAIT_CHECK(u.ndim() == 2 && s.A.ndim() == 3 && s.A.size(1) > 0 && u.size(1) > 0 && s.A.size(0) % u.size(1) == 0,
              "s4_step: u is {}, A {}; expected (batch, channels) and (copies channels, states, 2)", u.shape(), s.A.shape());
  const Shape vector = s.A.shape(), state = vector.inserted(0, u.size(0));
  const auto check_one = [&](const char* name, const Tensor& t, const Shape& shape) {
    KRAIT_CHECK(t.shape() == shape && t.dtype() == a && t.device() == u.device(), "s4_step: {} is {}, expected {} {} on {}", name,
                describe(t), name_of(a), shape, u.device());
  };
  for (const auto& [name, t] : {std::pair{"A", &s.A}, {"B", &s.B}, {"C", &s.C}}) check_one(name, *t, vector);
  check_one("the state", x, state);
  KRAIT_CHECK(x.is_contiguous(), "s4_step: the state's values are apart");
  if (s.D.defined()) check_one("D", s.D, {vector[0]});
  KRAIT_CHECK(s.M.defined() == s.Q.defined() && (!s.M.defined() || s.M.ndim() == 4), "s4_step: M and Q are (h, r, n, 2), both or neither");
  if (s.M.defined())
    for (const auto& [name, t] : {std::pair{"M", &s.M}, {"Q", &s.Q}}) check_one(name, *t, {vector[0], s.M.size(1), vector[1], 2});
  const auto whole = [](const Tensor& t) { return t.defined() ? t.contiguous() : Tensor(); };
  Tensor y = empty({u.size(0), vector[0]}, u.dtype(), u.device());
  bool done = y.numel() == 0;
  const S4System system{whole(s.A), whole(s.B), whole(s.C), whole(s.D), whole(s.M), whole(s.Q)};
  if (!done) KRAIT_DISPATCH_GPU(u.device(), s4_step(done, y, x, u.contiguous(), system, f));
  return done ? y : composed(x, u, s, f);
}

}  // namespace krait::kernels

#include "autograd/s4_scan.h"

#include "autograd/dense_ssm_kernel.h"
#include "autograd/elementwise.h"
#include "autograd/linear.h"
#include "autograd/reduce.h"
#include "autograd/shape.h"
#include "kernels/s4_scan.h"

namespace krait::autograd {

namespace {

struct ComplexVariable {
  Variable re, im;
};
ComplexVariable operator*(const ComplexVariable& a, const ComplexVariable& b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
ComplexVariable operator*(const Variable& a, const ComplexVariable& b) { return {a * b.re, a * b.im}; }
ComplexVariable conj(const ComplexVariable& a) { return {a.re, neg(a.im)}; }
ComplexVariable inverse(const ComplexVariable& a) { return reciprocal(square(a.re) + square(a.im)) * conj(a); }

// (s, ...) -> (h, ...) in fp64, each set repeated for its channels.
Variable per_channel(const Variable& x_in, int64_t h) {
  const Variable x = cast(x_in, DType::f64);
  const int64_t group = h / x.size(0);
  if (group == 1) return x;
  return reshape(expand(unsqueeze(x, 1), x.shape().inserted(1, group)), x.shape().with(0, h));
}
ComplexVariable complex_of(const Variable& x) { return {select(x, -1, 0), select(x, -1, 1)}; }
Variable joined(const ComplexVariable& x, DType dtype) { return cast(stack({x.re, x.im}, -1), dtype); }

/// The diagonal part: dt (h, 1), Lambda and a = dt Lambda (h, n).
struct Diagonal {
  Variable dt;
  ComplexVariable lambda, a;
  Diagonal(const Variable& log_dt, const Variable& log_A_re, const Variable& A_im) {
    const int64_t h = log_dt.size(0);
    KRAIT_CHECK(log_A_re.ndim() == 2 && log_A_re.size(0) > 0 && h % log_A_re.size(0) == 0,
                "s4: log_A_re is {}; its first size must divide the {} channels", log_A_re.shape(), h);
    dt = unsqueeze(exp(cast(log_dt, DType::f64)), -1);
    lambda = {neg(exp(per_channel(log_A_re, h))), per_channel(A_im, h)};
    a = dt * lambda;
  }
  // (1 - a/2)^-1
  ComplexVariable half_step() const { return inverse({1.0 - 0.5 * a.re, -0.5 * a.im}); }
};

}  // namespace

DiscreteSystem s4d_discretize(const Variable& log_dt, const Variable& log_A_re, const Variable& A_im,
                              const Variable& B, Discretization discretization) {
  KRAIT_CHECK(discretization != Discretization::euler, "s4d_discretize: expected zoh or bilinear");
  const Diagonal s(log_dt, log_A_re, A_im);
  const ComplexVariable b = complex_of(per_channel(B, log_dt.size(0)));
  const DType dtype = log_dt.dtype();
  if (discretization == Discretization::bilinear) {
    const ComplexVariable half = s.half_step(), a_bar = ComplexVariable{1.0 + 0.5 * s.a.re, 0.5 * s.a.im} * half;
    return {joined(a_bar, dtype), joined(s.dt * (half * b), dtype), {}, {}};
  }
  const Variable grow = exp(s.a.re), turn = grow * sin(s.a.im);
  // e^a - 1 without cancellation at small a
  const ComplexVariable step{expm1(s.a.re) * cos(s.a.im) - 2.0 * square(sin(0.5 * s.a.im)), turn};
  return {joined({grow * cos(s.a.im), turn}, dtype), joined(step * inverse(s.lambda) * b, dtype), {}, {}};
}

DiscreteSystem s4_discretize(const Variable& log_dt, const Variable& log_A_re, const Variable& A_im, const Variable& P,
                             const Variable& B) {
  const int64_t h = log_dt.size(0);
  const DType dtype = log_dt.dtype();
  const Diagonal s(log_dt, log_A_re, A_im);
  const ComplexVariable half = s.half_step(), a_bar = ComplexVariable{1.0 + 0.5 * s.a.re, 0.5 * s.a.im} * half;
  const ComplexVariable b_bar = s.dt * (half * complex_of(per_channel(B, h)));
  const auto wide = [](const ComplexVariable& x) { return ComplexVariable{unsqueeze(x.re, 1), unsqueeze(x.im, 1)}; };
  const ComplexVariable p = complex_of(per_channel(P.ndim() == 3 ? unsqueeze(P, 1) : P, h));  // (h, r, n)
  const ComplexVariable left = conj(p), dp = wide(0.5 * s.dt * half) * p;
  // 2 Re sum over the states of left and another: (h, r, k) from (h, k, n)
  const auto product = [&](const ComplexVariable& x) {
    return 2.0 * (matmul(left.re, x.re, false, true) - matmul(left.im, x.im, false, true));
  };
  const int64_t r = p.re.size(1);
  Tensor identity = zeros({r, r}, DType::f64, P.device());
  Tensor diagonal(identity.storage(), {r}, {r + 1}, identity.offset(), identity.dtype());
  fill_(diagonal, 1.0);
  const Variable kappa = batched_inverse(product(dp) + Variable(identity));
  const ComplexVariable m{matmul(kappa, dp.re, true, false), matmul(kappa, dp.im, true, false)};
  const ComplexVariable q = left * wide({1.0 + a_bar.re, a_bar.im});
  const Variable gain = product(wide(b_bar));  // (h, r, 1)
  const ComplexVariable b{b_bar.re - sum(gain * m.re, 1), b_bar.im - sum(gain * m.im, 1)};
  return {joined(a_bar, dtype), joined(b, dtype), joined(m, dtype), joined(q, dtype)};
}

ScanVariables s4_scan(const Variable& u, const DiscreteSystem& system, const Variable& C, const Variable& D,
                      const Variable& x0, const Tensor& segments) {
  const kernels::S4System s{system.A.data(), system.B.data(), C.data(), D.data(), system.M.data(), system.Q.data()};
  Vars inputs{u, system.A, system.B, C};
  if (system.M.defined()) require_no_grad("s4_scan of a low-rank system", {u, system.A, system.B, C});
  if (D.defined()) inputs.push_back(D);
  if (x0.defined()) inputs.push_back(x0);
  auto [y, last] = kernels::s4_scan_forward(u.data(), s, x0.data(), segments);
  const Vars out = record("s4_scan", inputs, {y, last},
                          [u = u.data(), s, x0 = x0.data(), segments](const std::vector<Tensor>& d) -> Grads {
                            auto g = kernels::s4_scan_backward(d[0], d[1], u, s, x0, segments);
                            Grads grads{g.du, g.dA, g.dB, g.dC};
                            if (s.D.defined()) grads.push_back(g.dD);
                            if (x0.defined()) grads.push_back(g.dx0);
                            return grads;
                          });
  return {out[0], out[1]};
}

}  // namespace krait::autograd

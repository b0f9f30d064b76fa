#pragma once
// The scalar mathematics of S4D that CPU and GPU share: one state of one channel, in double.
#include <cmath>

#include "kernels/complex.h"
#include "kernels/s4d_kernel.h"

namespace krait {
namespace kernels {

/// How many real gradients one state of one channel gives besides dC: log_A_re, A_im, B (2), log_dt.
inline constexpr int kS4dGradients = 5;

/// e^a - 1 without cancellation at small a.
KRAIT_HOST_DEVICE inline Complex64 complex_expm1(Complex64 a) {
  const double half = sin(0.5 * a.im), grow = expm1(a.re);
  return {grow * cos(a.im) - 2.0 * half * half, (grow + 1.0) * sin(a.im)};
}

/// A state's discretisation: A_bar, and f with B_bar = f B.
struct S4dState {
  double dt;
  Complex64 A, a, A_bar, f;  // a = dt A
};

KRAIT_HOST_DEVICE inline S4dState s4d_state(double log_dt, double log_A_re, double A_im, bool zoh) {
  S4dState s;
  s.dt = exp(log_dt);
  s.A = {-exp(log_A_re), A_im};
  s.a = s.dt * s.A;
  if (zoh) {
    const Complex64 e = complex_expm1(s.a);
    s.A_bar = {exp(s.a.re) * cos(s.a.im), e.im};
    s.f = e / s.A;
  } else {
    const Complex64 one{1, 0}, half = 0.5 * s.a;
    s.A_bar = (one + half) / (one - half);
    s.f = Complex64{s.dt, 0} / (one - half);
  }
  return s;
}

/// (a e^a - e^a + 1) / a^2; its series where that cancels.
KRAIT_HOST_DEVICE inline Complex64 s4d_phi(Complex64 a) {
  if (norm(a) < 1e-4) {
    Complex64 sum{6.0 / 5040.0, 0};
    const double c[] = {5.0 / 720.0, 1.0 / 30.0, 1.0 / 8.0, 1.0 / 3.0, 0.5};
    for (const double term : c) {
      sum = sum * a;
      sum.re += term;
    }
    return sum;
  }
  const Complex64 e = complex_expm1(a);
  return (a * e + a - e) / (a * a);
}

/// dc is the gradient of c = C B_bar, dA_bar that of A_bar. Writes dC and the kS4dGradients contributions.
KRAIT_HOST_DEVICE inline Complex64 s4d_chain(double* out, const S4dState& s, Complex64 B, Complex64 C, Complex64 dc,
                                             Complex64 dA_bar, bool zoh) {
  // derivatives of A_bar by a, of f by A and by dt
  Complex64 A_bar_a, f_A, f_dt;
  if (zoh) {
    A_bar_a = s.A_bar;
    f_A = (s.dt * s.dt) * s4d_phi(s.a);
    f_dt = s.A_bar;
  } else {
    const Complex64 g = (1.0 / s.dt) * s.f;  // 1 / (1 - a/2)
    A_bar_a = f_dt = g * g;
    f_A = 0.5 * (s.f * s.f);
  }
  const Complex64 df = conj(C * B) * dc;
  const Complex64 dA = conj(s.dt * A_bar_a) * dA_bar + conj(f_A) * df;
  const Complex64 ddt = conj(s.A * A_bar_a) * dA_bar + conj(f_dt) * df;
  const Complex64 dB = conj(C * s.f) * dc;
  out[0] = dA.re * s.A.re;
  out[1] = dA.im;
  out[2] = dB.re;
  out[3] = dB.im;
  out[4] = ddt.re * s.dt;
  return conj(B * s.f) * dc;
}

}  // namespace kernels
}  // namespace krait

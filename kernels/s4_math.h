#pragma once
// The scalar mathematics of S4's kernel that CPU and GPU share, in double, for rank R of the low-rank part.
// The pair of conjugate states j adds to R(X, Y), with u = -c dt Re Lambda, v = c dt Im Lambda, x = X_j Y_j,
//   (c p + i s q) / D    D = (u + i s)^2 + v^2    p = -2 dt (dt Re Lambda Re x + dt Im Lambda Im x)    q = 2 dt Re x.
// X is one of left = (C_tilde, P_1^*, ...), Y of right = (B, P_1, ...): sums[a (R + 1) + b] = R(left_a, right_b).
#include <cmath>

#include "kernels/complex.h"

namespace krait {
namespace kernels {

template <int R>
struct S4State {
  static constexpr int kSums = (R + 1) * (R + 1), kGradients = 5 + 2 * R;
  double dt, alpha, beta;  // dt Re Lambda, dt Im Lambda
  Complex64 left[R + 1], right[R + 1];
  double p[kSums], q[kSums];
};

/// State j of channel h, set g. P (s, R, n, 2).
template <int R, class T>
KRAIT_HOST_DEVICE S4State<R> s4_state(const T* log_dt, const T* log_A_re, const T* A_im, const T* P, const T* B,
                                      const T* C, int64_t h, int64_t g, int64_t j, int64_t n) {
  S4State<R> s;
  s.dt = exp(static_cast<double>(log_dt[h]));
  s.alpha = -s.dt * exp(static_cast<double>(log_A_re[g * n + j]));
  s.beta = s.dt * static_cast<double>(A_im[g * n + j]);
  s.left[0] = load_complex(C, h * n + j);
  s.right[0] = load_complex(B, g * n + j);
  for (int r = 0; r < R; ++r) {
    s.right[r + 1] = load_complex(P, (g * R + r) * n + j);
    s.left[r + 1] = conj(s.right[r + 1]);
  }
  for (int a = 0; a <= R; ++a)
    for (int b = 0; b <= R; ++b) {
      const Complex64 x = s.left[a] * s.right[b];
      s.p[a * (R + 1) + b] = -2.0 * s.dt * (s.alpha * x.re + s.beta * x.im);
      s.q[a * (R + 1) + b] = 2.0 * s.dt * x.re;
    }
  return s;
}

/// The gradients of one state of one channel from those of p, q, alpha and beta (through D). Returns dC_tilde; writes
/// the contributions of kernels/ssm_gradients.h.
template <int R>
KRAIT_HOST_DEVICE Complex64 s4_chain(double* out, const S4State<R>& s, const double* dp, const double* dq,
                                     double dalpha, double dbeta) {
  double ddt = 0;  // times dt
  Complex64 dleft[R + 1] = {}, dright[R + 1] = {};
  for (int a = 0; a <= R; ++a)
    for (int b = 0; b <= R; ++b) {
      const int i = a * (R + 1) + b;
      const Complex64 x = s.left[a] * s.right[b];
      dalpha -= 2.0 * s.dt * x.re * dp[i];
      dbeta -= 2.0 * s.dt * x.im * dp[i];
      ddt += dp[i] * s.p[i] + dq[i] * s.q[i];
      const Complex64 dx{2.0 * s.dt * (dq[i] - s.alpha * dp[i]), -2.0 * s.dt * s.beta * dp[i]};
      dleft[a] = dleft[a] + conj(s.right[b]) * dx;
      dright[b] = dright[b] + conj(s.left[a]) * dx;
    }
  out[0] = dalpha * s.alpha;
  out[1] = dbeta * s.dt;
  out[2] = dright[0].re;
  out[3] = dright[0].im;
  out[4] = dalpha * s.alpha + dbeta * s.beta + ddt;
  for (int r = 1; r <= R; ++r) {
    out[3 + 2 * r] = dright[r].re + dleft[r].re;
    out[4 + 2 * r] = dright[r].im - dleft[r].im;
  }
  return dleft[0];
}

/// Solves (I + c R(P^*, P)) y = b in place, or with the transposed matrix.
template <int R>
KRAIT_HOST_DEVICE void s4_solve(Complex64* y, const Complex64* sums, double c, bool transposed) {
  static_assert(R == 1 || R == 2);
  const Complex64 one{1, 0};
  if constexpr (R == 1) {
    y[0] = y[0] / (one + c * sums[3]);
  } else {
    const Complex64 a = one + c * sums[4], d = one + c * sums[8];
    const Complex64 b = c * sums[transposed ? 7 : 5], e = c * sums[transposed ? 5 : 7];
    const Complex64 scale = one / (a * d - b * e), y0 = y[0], y1 = y[1];
    y[0] = scale * (d * y0 - b * y1);
    y[1] = scale * (a * y1 - e * y0);
  }
}

/// K_hat without its factor e^(i t/2).
template <int R>
KRAIT_HOST_DEVICE Complex64 s4_woodbury(const Complex64* sums, double c) {
  Complex64 y[R], value = sums[0];
  for (int r = 0; r < R; ++r) y[r] = sums[(r + 1) * (R + 1)];
  s4_solve<R>(y, sums, c, false);
  for (int r = 0; r < R; ++r) value = value - c * (sums[r + 1] * y[r]);
  return value;
}

/// Its gradient by the sums.
template <int R>
KRAIT_HOST_DEVICE void s4_woodbury_backward(Complex64* dsums, const Complex64* sums, double c, Complex64 d) {
  Complex64 y[R], z[R];
  for (int r = 0; r < R; ++r) {
    y[r] = sums[(r + 1) * (R + 1)];
    z[r] = sums[r + 1];
  }
  s4_solve<R>(y, sums, c, false);
  s4_solve<R>(z, sums, c, true);
  dsums[0] = d;
  for (int k = 0; k < R; ++k) {
    dsums[k + 1] = conj(-c * y[k]) * d;
    dsums[(k + 1) * (R + 1)] = conj(-c * z[k]) * d;
    for (int l = 0; l < R; ++l) dsums[(k + 1) * (R + 1) + l + 1] = conj((c * c) * (z[k] * y[l])) * d;
  }
}

}  // namespace kernels
}  // namespace krait

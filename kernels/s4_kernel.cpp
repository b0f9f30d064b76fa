#include "kernels/s4_kernel.h"

#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "kernels/complex.h"
#include "kernels/inverse.h"
#include "kernels/matmul.h"
#include "kernels/ssm_gradients.h"
#include "kernels/ssm_parameters.h"

namespace krait::kernels {

namespace {

S4Parameters checked(const S4Parameters& p) {
  check_ssm_parameters("s4_kernel", p.log_dt, p.log_A_re, p.A_im, p.B, p.C_tilde);
  check_same("s4_kernel", p.log_dt, p.P);
  const int64_t s = p.log_A_re.size(0), n = p.log_A_re.size(1);
  const int64_t rank = p.P.ndim() == 4 ? p.P.size(1) : 1;
  KRAIT_CHECK((rank == 1 || rank == 2) && (p.P.shape() == (Shape{s, n, 2}) || p.P.shape() == (Shape{s, rank, n, 2})),
              "s4_kernel: P is {}, expected {} or {} with rank r = 1 or 2", p.P.shape(), Shape{s, n, 2}, "(s, r, n, 2)");
  return {p.log_dt.contiguous(), p.log_A_re.contiguous(),
          p.A_im.contiguous(), p.P.ndim() == 4 ? p.P.contiguous() : p.P.contiguous().unsqueeze(1),
          p.B.contiguous(),    p.C_tilde.contiguous()};
}

Tensor wide_cpu(const Tensor& t) { return t.to(kCpu).to(DType::f64).contiguous(); }

S4Parameters wide_cpu(const S4Parameters& in) {
  const S4Parameters p = checked(in);
  return {wide_cpu(p.log_dt), wide_cpu(p.log_A_re), wide_cpu(p.A_im), wide_cpu(p.P), wide_cpu(p.B), wide_cpu(p.C_tilde)};
}

// Output rows of the real system: (2 Re C, -2 Im C), one (1, 2n) matrix a channel, and back.
Tensor to_rows(const Tensor& C) {
  const int64_t h = C.size(0), n = C.size(1);
  Tensor rows = empty({h, 1, 2 * n}, DType::f64, kCpu);
  for (int64_t c = 0; c < h; ++c)
    for (int64_t j = 0; j < n; ++j) {
      rows.data<double>()[c * 2 * n + j] = 2.0 * C.data<double>()[(c * n + j) * 2];
      rows.data<double>()[c * 2 * n + n + j] = -2.0 * C.data<double>()[(c * n + j) * 2 + 1];
    }
  return rows;
}

Tensor from_rows(const Tensor& rows, const Tensor& like) {
  const int64_t h = rows.size(0), n = rows.size(2) / 2;
  Tensor C = empty({h, n, 2}, DType::f64, kCpu);
  for (int64_t c = 0; c < h; ++c)
    for (int64_t j = 0; j < n; ++j) {
      C.data<double>()[(c * n + j) * 2] = 0.5 * rows.data<double>()[c * 2 * n + j];
      C.data<double>()[(c * n + j) * 2 + 1] = -0.5 * rows.data<double>()[c * 2 * n + n + j];
    }
  return C.to(like.dtype()).to(like.device());
}

// rows A_bar^length, squaring A_bar once per bit; with A_power the whole matrix power too.
Tensor times_power(Tensor rows, Tensor A_bar, int64_t length, Tensor* A_power = nullptr) {
  for (int64_t bits = length; bits > 0; bits /= 2) {
    if (bits % 2) {
      rows = matmul(rows, A_bar);
      if (A_power) *A_power = A_power->defined() ? matmul(*A_power, A_bar) : A_bar;
    }
    if (bits > 1) A_bar = matmul(A_bar, A_bar);
  }
  return rows;
}

Tensor combined(double a, const Tensor& x, double b, const Tensor& y) {
  Tensor out = empty_like(x);
  for (int64_t i = 0; i < x.numel(); ++i) out.data<double>()[i] = a * x.data<double>()[i] + b * y.data<double>()[i];
  return out;
}

Tensor plus_identity(double a, const Tensor& x) {  // I + a x
  Tensor out = x.clone();
  const int64_t n = x.size(-1);
  double* p = out.data<double>();
  for (int64_t i = 0; i < out.numel(); ++i) p[i] = a * p[i] + (i / n % n == i % n ? 1.0 : 0.0);
  return out;
}

}  // namespace

Tensor s4_kernel_forward(const S4Parameters& parameters, int64_t length) {
  KRAIT_CHECK(length >= 0, "s4_kernel: length is {}", length);
  const S4Parameters p = checked(parameters);
  Tensor K = empty({p.log_dt.size(0), length}, p.log_dt.dtype(), p.log_dt.device());
  if (K.numel() > 0) KRAIT_DISPATCH(K.device(), s4_kernel_forward(K, p));
  return K;
}

S4Parameters s4_kernel_backward(const Tensor& dK, const S4Parameters& parameters) {
  const S4Parameters p = checked(parameters);
  check_same("s4_kernel", dK, p.log_dt);
  const int64_t h = p.log_dt.size(0), n = p.log_A_re.size(1);
  KRAIT_CHECK(dK.ndim() == 2 && dK.size(0) == h, "s4_kernel: dK is {}, expected ({}, length)", dK.shape(), h);
  S4Parameters d{zeros_like(p.log_dt), zeros_like(p.log_A_re), zeros_like(p.A_im),
                 zeros_like(p.P),      zeros_like(p.B),        zeros_like(p.C_tilde)};
  if (dK.numel() > 0 && n > 0) {
    Tensor contributions = empty({h, n, 5 + 2 * p.P.size(1)}, DType::f64, dK.device());
    KRAIT_DISPATCH(dK.device(), s4_kernel_backward(d.C_tilde, contributions, dK.contiguous(), p));
    KRAIT_DISPATCH(dK.device(), ssm_sum_gradients(d.log_dt, d.log_A_re, d.A_im, d.B, d.P, contributions));
  }
  d.P = d.P.view(parameters.P.shape());
  return d;
}

RealSystem s4_real_system(const S4Parameters& parameters) {
  const S4Parameters p = wide_cpu(parameters);
  const int64_t h = p.log_dt.size(0), s = p.log_A_re.size(0), n = p.log_A_re.size(1), rank = p.P.size(1), N = 2 * n;
  // x' = Lambda x - sum_r P_r 2 Re(P_r^H x) + B u, in (Re x, Im x), times dt/2
  Tensor half = zeros({h, N, N}, DType::f64, kCpu), dt_B = empty({h, N, 1}, DType::f64, kCpu);
  for (int64_t c = 0; c < h; ++c) {
    const double dt = std::exp(p.log_dt.data<double>()[c]);
    const int64_t g = c / (h / s);
    double *A = half.data<double>() + c * N * N, *B = dt_B.data<double>() + c * N;
    for (int64_t j = 0; j < n; ++j) {
      const double re = -std::exp(p.log_A_re.data<double>()[g * n + j]), im = p.A_im.data<double>()[g * n + j];
      A[j * N + j] = A[(n + j) * N + n + j] = 0.5 * dt * re;
      A[j * N + n + j] = -0.5 * dt * im;
      A[(n + j) * N + j] = 0.5 * dt * im;
      const Complex64 b = load_complex(p.B.data<double>(), g * n + j);
      B[j] = dt * b.re;
      B[n + j] = dt * b.im;
    }
    for (int64_t r = 0; r < rank; ++r) {
      std::vector<double> q(static_cast<size_t>(N));
      for (int64_t i = 0; i < N; ++i)
        q[static_cast<size_t>(i)] = p.P.data<double>()[((g * rank + r) * n + i % n) * 2 + i / n];
      for (int64_t i = 0; i < N; ++i)
        for (int64_t k = 0; k < N; ++k) A[i * N + k] -= dt * q[static_cast<size_t>(i)] * q[static_cast<size_t>(k)];
    }
  }
  if (half.numel() == 0) return {half, dt_B.view({h, N})};
  const Tensor inverted = batched_inverse(plus_identity(-1.0, half));
  return {matmul(inverted, plus_identity(1.0, half)), matmul(inverted, dt_B).view({h, N})};
}

Tensor s4_c_to_tilde(const S4Parameters& p, int64_t length) {
  const Tensor rows = to_rows(wide_cpu(p.C_tilde));
  return from_rows(combined(1.0, rows, -1.0, times_power(rows, s4_real_system(p).A_bar, length)), p.C_tilde);
}

Tensor s4_tilde_to_c(const S4Parameters& p, int64_t length) {
  KRAIT_CHECK(length >= 1, "s4: C_tilde of length {} does not determine C", length);
  const Tensor rows = to_rows(wide_cpu(p.C_tilde));
  Tensor power;
  times_power(rows, s4_real_system(p).A_bar, length, &power);
  return from_rows(matmul(rows, batched_inverse(plus_identity(-1.0, power))), p.C_tilde);
}

Tensor s4_double_length(const S4Parameters& p, int64_t length) {
  const Tensor rows = to_rows(wide_cpu(p.C_tilde));
  return from_rows(combined(1.0, rows, 1.0, times_power(rows, s4_real_system(p).A_bar, length)), p.C_tilde);
}

}  // namespace krait::kernels

#include "kernels/s4d_kernel.h"

#include "kernels/s4d_math.h"
#include "kernels/ssm_gradients.h"
#include "kernels/ssm_parameters.h"

namespace krait::kernels {

namespace {

S4dParameters checked(const S4dParameters& p) {
  check_ssm_parameters("s4d_kernel", p.log_dt, p.log_A_re, p.A_im, p.B, p.C);
  return {p.log_dt.contiguous(), p.log_A_re.contiguous(), p.A_im.contiguous(), p.B.contiguous(), p.C.contiguous()};
}

bool is_zoh(Discretization d) {
  KRAIT_CHECK(d != Discretization::euler, "s4d_kernel: euler is not offered; use zoh or bilinear");
  return d == Discretization::zoh;
}

}  // namespace

Tensor s4d_kernel_forward(const S4dParameters& parameters, int64_t length, Discretization discretization) {
  KRAIT_CHECK(length >= 0, "s4d_kernel: length is {}", length);
  const S4dParameters p = checked(parameters);
  const bool zoh = is_zoh(discretization);
  Tensor K = empty({p.log_dt.size(0), length}, p.log_dt.dtype(), p.log_dt.device());
  if (K.numel() > 0) KRAIT_DISPATCH(K.device(), s4d_kernel_forward(K, p, zoh));
  return K;
}

S4dParameters s4d_kernel_backward(const Tensor& dK, const S4dParameters& parameters, Discretization discretization) {
  const S4dParameters p = checked(parameters);
  const bool zoh = is_zoh(discretization);
  check_same("s4d_kernel", dK, p.log_dt);
  const int64_t h = p.log_dt.size(0), n = p.log_A_re.size(1);
  KRAIT_CHECK(dK.ndim() == 2 && dK.size(0) == h, "s4d_kernel: dK is {}, expected ({}, length)", dK.shape(), h);
  S4dParameters d{zeros_like(p.log_dt), zeros_like(p.log_A_re), zeros_like(p.A_im), zeros_like(p.B), zeros_like(p.C)};
  if (dK.numel() == 0 || n == 0) return d;
  Tensor contributions = empty({h, n, kS4dGradients}, DType::f64, dK.device()), no_P;
  KRAIT_DISPATCH(dK.device(), s4d_kernel_backward(d.C, contributions, dK.contiguous(), p, zoh));
  KRAIT_DISPATCH(dK.device(), ssm_sum_gradients(d.log_dt, d.log_A_re, d.A_im, d.B, no_P, contributions));
  return d;
}

}  // namespace krait::kernels

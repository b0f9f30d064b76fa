#include "autograd/s4_kernel.h"

#include "kernels/s4_kernel.h"

namespace krait::autograd {

Variable s4d_kernel(const Variable& log_dt, const Variable& log_A_re, const Variable& A_im, const Variable& B,
                    const Variable& C, int64_t length, Discretization discretization) {
  const kernels::S4dParameters p{log_dt.data(), log_A_re.data(), A_im.data(), B.data(), C.data()};
  return record("s4d_kernel", {log_dt, log_A_re, A_im, B, C}, kernels::s4d_kernel_forward(p, length, discretization),
                [p, discretization](const Tensor& dK) -> Grads {
                  const auto d = kernels::s4d_kernel_backward(dK, p, discretization);
                  return {d.log_dt, d.log_A_re, d.A_im, d.B, d.C};
                });
}

Variable s4_kernel(const Variable& log_dt, const Variable& log_A_re, const Variable& A_im, const Variable& P,
                   const Variable& B, const Variable& C_tilde, int64_t length) {
  const kernels::S4Parameters p{log_dt.data(), log_A_re.data(), A_im.data(), P.data(), B.data(), C_tilde.data()};
  return record("s4_kernel", {log_dt, log_A_re, A_im, P, B, C_tilde}, kernels::s4_kernel_forward(p, length),
                [p](const Tensor& dK) -> Grads {
                  const auto d = kernels::s4_kernel_backward(dK, p);
                  return {d.log_dt, d.log_A_re, d.A_im, d.P, d.B, d.C_tilde};
                });
}

}  // namespace krait::autograd

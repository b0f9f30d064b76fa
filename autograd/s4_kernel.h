#pragma once
#include "autograd/dense_ssm_kernel.h"
#include "autograd/variable.h"
#include "kernels/s4d_kernel.h"

namespace krait {
inline namespace autograd {

// Convolution kernels K (h, length) of state-space layers. fp32 or fp64, all tensors alike. Complex parameters end in
// an axis of 2 (re, im). The parameters of A, B and P come in s sets, s a divisor of h; channel j uses set j / (h / s).

/// Diagonal: K_l = 2 Re sum_n C B_bar A_bar^l. log_dt (h), log_A_re and A_im (s, n), B (s, n, 2), C (h, n, 2).
/// See kernels/s4d_kernel.h.
Variable s4d_kernel(const Variable& log_dt, const Variable& log_A_re, const Variable& A_im, const Variable& B,
                    const Variable& C, int64_t length, Discretization discretization);

/// Diagonal plus low rank, bilinear; P (s, n, 2), or (s, r, n, 2) for rank r; C_tilde (h, n, 2) = C (I - A_bar^length).
/// `length` is the one C_tilde was made for. See kernels/s4_kernel.h, which also turns C into C_tilde and back.
Variable s4_kernel(const Variable& log_dt, const Variable& log_A_re, const Variable& A_im, const Variable& P,
                   const Variable& B, const Variable& C_tilde, int64_t length);

}  // namespace autograd
}  // namespace krait

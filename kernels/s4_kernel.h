#pragma once
#include <cstdint>

#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// The convolution kernel of diagonal-plus-low-rank state-space models (S4, Gu, Goel & Re 2022, section 3 and C.3),
///   A = diag(Lambda) - P P^*    Lambda = -e^log_A_re + i A_im    dt = e^log_dt    bilinear discretisation,
/// from C_tilde = C (I - A_bar^L) by its generating function at the L-th roots of unity. With w = e^(-i t),
/// t = 2 pi k / L, s = 2 sin(t/2), c = cos(t/2) and the sums over all conjugate pairs of states
///   R(X, Y) = sum_j dt X_j Y_j / (i s - c dt Lambda_j)
///   K_hat(w) = e^(i t/2) (R(C_tilde, B) - c R(C_tilde, P) (I + c R(P^*, P))^-1 R(P^*, B))    K = irfft(K_hat)
/// which is the Cauchy kernel with Woodbury's correction multiplied through: nothing is divided by 1 + w, and s and c
/// are real, so that no digit is lost near the poles.
/// n counts one of each pair of complex conjugate states. A, B, P come in s sets: channel j uses set j / (h / s).
struct S4Parameters {
  Tensor log_dt;          // (h)
  Tensor log_A_re, A_im;  // (s, n)
  Tensor P;               // (s, n, 2), or (s, r, n, 2) for rank r = 1, 2
  Tensor B;               // (s, n, 2)
  Tensor C_tilde;         // (h, n, 2)
};

/// fp32 or fp64, complex values as (re, im). Computed in fp64 whatever the dtype: beside a pole t = dt Im Lambda of
/// width dt an fp32 difference keeps no more than 3 digits. K (h, length); length must be the L of C_tilde.
Tensor s4_kernel_forward(const S4Parameters& p, int64_t length);
/// The gradients of the parameters, in the same struct; dK (h, length). Sums run in a fixed order.
S4Parameters s4_kernel_backward(const Tensor& dK, const S4Parameters& p);

// Dense helpers for initial values, generation and longer kernels: on the CPU in fp64, O(n^3 log length) a channel,
// not differentiable. The parameter C_tilde of the struct holds the vector to convert; the results are like it.

/// C_tilde = C (I - A_bar^length) from p.C_tilde = C.
Tensor s4_c_to_tilde(const S4Parameters& p, int64_t length);
/// C from C_tilde by solving that equation.
Tensor s4_tilde_to_c(const S4Parameters& p, int64_t length);
/// C_tilde for kernels of twice the length: C_tilde (I + A_bar^length).
Tensor s4_double_length(const S4Parameters& p, int64_t length);

/// A_bar (h, 2n, 2n) and B_bar (h, 2n), fp64 CPU, of the real system in which a state x is (Re x, Im x); its output row
/// for C is (2 Re C, -2 Im C).
struct RealSystem {
  Tensor A_bar, B_bar;
};
RealSystem s4_real_system(const S4Parameters& p);

// Backends: not empty, contiguous, P (s, r, n, 2). contributions: see kernels/ssm_gradients.h.
KRAIT_BACKENDS(void s4_kernel_forward(Tensor& K, const S4Parameters& p);
               void s4_kernel_backward(Tensor& dC_tilde, Tensor& contributions, const Tensor& dK,
                                       const S4Parameters& p))

}  // namespace kernels
}  // namespace krait

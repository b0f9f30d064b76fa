#pragma once
#include "autograd/variable.h"
#include "kernels/s4d_kernel.h"

namespace krait {
inline namespace autograd {

using kernels::Discretization;

// The recurrent form of state-space layers; the mathematics is in kernels/s4_scan.h. Complex values end in an axis of
// 2 (re, im). Parameters of A, B, P come in s sets, s a divisor of h; channel j uses set j / (h / s).

/// A discretised system, one for each channel, in the dtype of the parameters and computed in fp64:
/// A, B (h, n, 2); M, Q (h, r, n, 2), undefined for a diagonal one.
struct DiscreteSystem {
  Variable A, B, M, Q;
};
/// log_dt (h), log_A_re and A_im (s, n), B (s, n, 2); zoh or bilinear.
DiscreteSystem s4d_discretize(const Variable& log_dt, const Variable& log_A_re, const Variable& A_im,
                              const Variable& B, Discretization discretization);
/// P (s, n, 2) or (s, r, n, 2); bilinear, by Woodbury: with D = dt/2 (1 - dt Lambda/2)^-1, a the diagonal's bilinear
/// A_bar, b its B_bar and R = 2 Re P^* D P:
///   A_bar x = a x - M (2 Re Q x)   M = D P (I + R)^-1   Q = conj(P) (1 + a)   B_bar = b - M (2 Re conj(P) b)
DiscreteSystem s4_discretize(const Variable& log_dt, const Variable& log_A_re, const Variable& A_im, const Variable& P,
                             const Variable& B);

/// From state x0 (b, h, n, 2; undefined: zeros): y (b, l, h) like u and the last state. C (h, n, 2); D (h) may be
/// undefined. Differentiable for diagonal systems; a low-rank part throws when a gradient is wanted.
struct ScanVariables {
  Variable y, last;
};
ScanVariables s4_scan(const Variable& u, const DiscreteSystem& system, const Variable& C, const Variable& D = {},
                      const Variable& x0 = {}, const Tensor& segments = {});

}  // namespace autograd
}  // namespace krait

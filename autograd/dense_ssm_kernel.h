#pragma once
#include "autograd/variable.h"
#include "kernels/s4d_kernel.h"

namespace krait {
inline namespace autograd {

using kernels::Discretization;

// State-space models with a dense real A: the controls of the HiPPO ablation. A (s, n, n) and B (s, n) come in s sets,
// s a divisor of the h channels; channel j uses set j / (h / s). fp32 or fp64, all alike; computed in fp64, because
// A_bar of a non-normal A loses digits at every squaring. Composed of batched matrix products, O(log length) of them.

/// A_bar (h, n, n) and B_bar (h, n), in fp64.
struct DenseSystem {
  Variable A_bar, B_bar;
};
DenseSystem dense_ssm_discretize(const Variable& log_dt, const Variable& A, const Variable& B,
                                 Discretization discretization);

/// K_l = C A_bar^l B_bar (h, length) in the dtype of the inputs; log_dt (h), C (h, n).
Variable dense_ssm_kernel(const Variable& log_dt, const Variable& A, const Variable& B, const Variable& C,
                          int64_t length, Discretization discretization);

/// Inverses of fp64 matrices (b, n, n); see kernels/inverse.h.
Variable batched_inverse(const Variable& a);

}  // namespace autograd
}  // namespace krait

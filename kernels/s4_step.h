#pragma once
#include <optional>

#include "core/gpu_backend.h"
#include "kernels/activation.h"
#include "kernels/s4_scan.h"

namespace krait {
namespace kernels {

/// One position of S4's diagonal and DPLR systems (kernels/s4_scan.h) and the activation behind it:
///   x = A x - sum_r M_r (2 Re sum_n Q_{r,n} x_n) + B u      y = f(2 Re sum_n C_n x_n + D u)
/// u (b, h): fp32, bf16 or fp64. The system, discretised, has c h channels (several copies of the h, one after the other);
/// channel r reads u[r % h]. x (b, c h, n, 2) in the dtype of sums, contiguous, advances in place. y (b, c h) like u, rounded
/// to its dtype before f, as the sequence form does; without f: as it is.
Tensor s4_step(Tensor& x, const Tensor& u, const S4System& system, std::optional<Activation> f);

// On a GPU: done says whether it has one kernel for it; else nothing was written, and the operations for sequences run.
// Everything is contiguous, nothing is empty.
KRAIT_GPU_BACKEND(void s4_step(bool& done, Tensor& y, Tensor& x, const Tensor& u, const S4System& s, std::optional<Activation> f))

}  // namespace kernels
}  // namespace krait

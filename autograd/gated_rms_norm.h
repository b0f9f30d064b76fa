#pragma once
#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

/// RMSNorm of x silu(z) over each of `groups` groups of channels, times w; with norm_first the gate multiplies the
/// normalised x instead. See kernels/gated_rms_norm.h.
Variable gated_rms_norm(const Variable& x, const Variable& z, const Variable& w, double eps, int64_t groups = 1,
                        bool norm_first = false);

}  // namespace autograd
}  // namespace krait

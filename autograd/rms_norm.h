#pragma once
#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

/// RMSNorm over the last dimension: y = x (mean x^2 + eps)^(-1/2) w. See kernels/rms_norm.h for dtypes.
Variable rms_norm(const Variable& x, const Variable& w, double eps);

/// The residual stream after an addition, and its norm.
struct AddNorm { Variable residual, y; };
/// residual' = x + residual, y = rms_norm(residual', w, eps), in one pass. residual like x, or fp32 with bf16 x.
AddNorm add_rms_norm(const Variable& x, const Variable& residual, const Variable& w, double eps);

}  // namespace autograd
}  // namespace krait

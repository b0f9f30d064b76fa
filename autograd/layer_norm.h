#pragma once
#include "autograd/rms_norm.h"

namespace krait {
inline namespace autograd {

/// LayerNorm over the last dimension: y = (x - mean) (var + eps)^(-1/2) w + b; b may be an undefined Variable.
/// See kernels/layer_norm.h for dtypes.
Variable layer_norm(const Variable& x, const Variable& w, const Variable& b, double eps);
/// residual' = x + residual, y = layer_norm(residual', w, b, eps), in one pass. residual like x, or fp32 with bf16 x.
AddNorm add_layer_norm(const Variable& x, const Variable& residual, const Variable& w, const Variable& b, double eps);

}  // namespace autograd
}  // namespace krait

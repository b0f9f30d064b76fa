#pragma once
#include "autograd/rms_norm.h"

namespace krait {
inline namespace autograd {

/// LayerNorm over the last dimension: y = (x - mean) (var + eps)^(-1/2) (w + weight_offset) + b; b may be an undefined
/// Variable. See kernels/layer_norm.h for dtypes.
Variable layer_norm(const Variable& x, const Variable& w, const Variable& b, double eps, double weight_offset = 0);
/// residual' = x + residual, y = layer_norm(residual', ...), in one pass. residual like x, or fp32 with bf16 x.
AddNorm add_layer_norm(const Variable& x, const Variable& residual, const Variable& w, const Variable& b, double eps,
                       double weight_offset = 0);

}  // namespace autograd
}  // namespace krait

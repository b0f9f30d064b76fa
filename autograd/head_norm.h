#pragma once
#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

/// LayerNorm without bias of each head: x (..., h, p), w (h p) in x's dtype or fp32. See kernels/head_norm.h.
Variable head_norm(const Variable& x, const Variable& w, double eps);

}  // namespace autograd
}  // namespace krait

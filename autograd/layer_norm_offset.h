#pragma once
#include "autograd/layer_norm.h"

namespace krait {
inline namespace autograd {

/// layer_norm and add_layer_norm with the weight w + weight_offset, of which no tensor is made.
Variable layer_norm(const Variable& x, const Variable& w, const Variable& b, double eps, double weight_offset);
AddNorm add_layer_norm(const Variable& x, const Variable& residual, const Variable& w, const Variable& b, double eps,
                       double weight_offset);

}  // namespace autograd
}  // namespace krait

#pragma once
#include <string_view>

#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

/// Zero with probability p, else x / (1 - p), with the numbers of current_random(). The first dimension is the
/// batch: a sequence's mask depends on its global index, not on the rank. Streams need distinct names: the same
/// name draws the same mask. p = 0 returns x.
Variable dropout(const Variable& x, double p, std::string_view stream);
/// residual + dropout(x), in one pass.
Variable dropout_add(const Variable& x, const Variable& residual, double p, std::string_view stream);

}  // namespace autograd
}  // namespace krait

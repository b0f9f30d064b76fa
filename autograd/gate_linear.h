#pragma once
#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

/// x w^T with the sums left as they are: x (..., in), w (out, in) to (..., out) in fp32 also for bf16 (fp64 for fp64).
/// For gates whose exponentials would show the rounding to bf16. The gradient is rounded to x's dtype.
Variable gate_linear(const Variable& x, const Variable& w);
/// The same for an x whose columns come in parts (..., in_1), (..., in_2), ... that add up to in.
Variable gate_linear(const Vars& parts, const Variable& w);

}  // namespace autograd
}  // namespace krait

#pragma once
#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

/// A block-diagonal map: y[.., n, o] = sum_i w[n, o, i] x[.., n, i]. x (..., blocks in), w (blocks, out, in),
/// y (..., blocks out). Small blocks have a kernel of their own (kernels/block_linear.h), larger ones are a batch of
/// products. Where w accumulates in place, its gradient is added straight into its buffer.
Variable block_linear(const Variable& x, const Variable& w);

}  // namespace autograd
}  // namespace krait

#pragma once
#include "autograd/variable.h"
#include "kernels/embedding.h"

namespace krait {
inline namespace autograd {

/// y[..., :] = table[tokens[...], :]; table (v, d), tokens (...) int32 or int64. See kernels/embedding.h.
/// The gradient is added straight into table.grad() where the table has a buffer of its dtype or fp32.
Variable embedding(const Variable& table, const Tensor& tokens, kernels::TableRows rows = {});

}  // namespace autograd
}  // namespace krait

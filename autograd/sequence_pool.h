#pragma once
#include "autograd/variable.h"
#include "kernels/sequence_pool.h"

namespace krait {
inline namespace autograd {

using kernels::Pool;

/// x (b, l, d) to (b, d): the mean of the first lengths[b] positions, or the last of them (kernels/sequence_pool.h).
Variable sequence_pool(const Variable& x, const Tensor& lengths, Pool pool);

}  // namespace autograd
}  // namespace krait

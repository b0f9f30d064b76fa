#pragma once
#include "autograd/variable.h"
#include "core/comm/process_group.h"
#include "kernels/sequence_pool.h"

namespace krait {
inline namespace autograd {

using kernels::Pool;

/// x (b, l, d) to (b, d): the mean of the first lengths[b] positions, or the last of them (kernels/sequence_pool.h).
Variable sequence_pool(const Variable& x, const Tensor& lengths, Pool pool);
/// The same of sequences that lie over a group, x (b, l, d) the own piece, lengths those of whole sequences: replicated.
/// The gradients of all members' results are added up: where each goes on to the same loss, all but one must be 0.
Variable sequence_pool(const Variable& x, const Tensor& lengths, Pool pool, const comm::GroupPtr& group);

}  // namespace autograd
}  // namespace krait

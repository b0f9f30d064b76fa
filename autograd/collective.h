#pragma once
#include "autograd/variable.h"
#include "core/comm/process_group.h"

namespace krait {
inline namespace autograd {

// Differentiable collectives. Every member of the group makes the same calls in the same order. All return x itself in
// a group of one. "Replicated": every member holds the same values, and the same gradient of them.

/// Megatron's f: x replicated, used by each member for a part of its own. Identity; dx = sum of the members' dy.
Variable copy_to_group(const Variable& x, const comm::GroupPtr& group);
/// Megatron's g: y = sum of the members' x, replicated. dx = dy. An x that nobody else holds (move it) is summed in place.
Variable reduce_from_group(Variable x, const comm::GroupPtr& group);
/// y = the members' x joined along dim in rank order, replicated (every member goes on to compute the same).
/// dx = own part of dy.
Variable gather_from_group(const Variable& x, int64_t dim, const comm::GroupPtr& group);
/// The same y, used by each member for something else: dx = own part of the sum of the members' dy (reduce-scatter).
Variable all_gather_sum(const Variable& x, int64_t dim, const comm::GroupPtr& group);
/// Own part along dim of a replicated x. dx = the members' dy joined.
Variable scatter_to_group(const Variable& x, int64_t dim, const comm::GroupPtr& group);
/// y = own part along dim of the sum of the members' x. dx = the members' dy joined (the transpose of all_gather_sum).
Variable reduce_scatter_to_group(const Variable& x, int64_t dim, const comm::GroupPtr& group);
/// x is cut in size() parts along split_dim, part r goes to member r; the parts received are joined along join_dim in
/// rank order. dx is the inverse exchange of dy.
Variable all_to_all(const Variable& x, int64_t split_dim, int64_t join_dim, const comm::GroupPtr& group);

}  // namespace autograd
}  // namespace krait

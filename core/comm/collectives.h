#pragma once
#include "core/comm/process_group.h"

namespace krait::comm {

// Collectives along a dimension, into new tensors, complete in stream order on return. x may have any strides.
// In a group of one they return x itself.

/// The sum (maximum) of every member's x.
Tensor all_reduce(const Tensor& x, ProcessGroup& group, Reduce op = Reduce::sum);
/// Every member's x, joined along dim in rank order.
Tensor all_gather(const Tensor& x, int64_t dim, ProcessGroup& group);
/// This member's part along dim of the sum of every member's x.
Tensor reduce_scatter(const Tensor& x, int64_t dim, ProcessGroup& group);
/// x is cut in size() parts along split_dim; the parts received are joined along join_dim in rank order.
Tensor all_to_all(const Tensor& x, int64_t split_dim, int64_t join_dim, ProcessGroup& group);
/// This member's part of x along dim: a view, nothing is sent.
Tensor own_part(const Tensor& x, int64_t dim, const ProcessGroup& group);

}  // namespace krait::comm

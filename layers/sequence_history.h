#pragma once
#include "autograd/sequence_exchange.h"

namespace krait::layers {

/// What a causal convolution over x (b, l, c) takes as its initial state: the `rows` inputs before it, from the members to
/// the left where several share a sequence, else `carried` (a value or undefined), which belongs in front of the first.
Variable convolution_history(const Variable& x, int64_t rows, const comm::GroupPtr& group, const Tensor& segments,
                             const Variable& carried);

/// The last member's tensor on every member: what a sequence that several share leaves behind.
Tensor from_last_piece(const Tensor& t, const comm::GroupPtr& group);

}  // namespace krait::layers

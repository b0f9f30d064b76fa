#pragma once
#include "autograd/variable.h"
#include "core/comm/process_group.h"

namespace krait {
inline namespace autograd {

/// Rows [begin, end) of a matrix here, which are rows [at, at + end - begin) of a whole that members hold copies of.
struct SharedRows {
  int64_t begin, end, at;
};
struct SharedMatrix {
  Variable& w;  // undefined: nothing to share
  std::vector<SharedRows> rows;
};
/// Makes each w itself, but with the gradients of its shared rows summed over the members that hold the same rows: for
/// weights that each member uses for heads of its own. One collective for all of them, when their gradients are complete.
/// `whole`: how many rows of each may be shared. Every member calls it with the same whole. Nothing in a group of one.
void share_rows(const std::vector<SharedMatrix>& matrices, int64_t whole, const comm::GroupPtr& group);

}  // namespace autograd
}  // namespace krait

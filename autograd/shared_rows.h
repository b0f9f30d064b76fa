#pragma once
#include "autograd/variable.h"
#include "core/comm/process_group.h"

namespace krait {
inline namespace autograd {

/// Rows [begin, end) of a matrix here, which are rows [at, at + end - begin) of a whole that members hold copies of.
struct SharedRows {
  int64_t begin, end, at;
};
/// w itself, but with the gradients of its shared rows summed over the members that hold the same rows: for weights that
/// each member uses for heads of its own. `whole`: how many rows may be shared. Every member calls it with the same
/// whole. w itself in a group of one.
Variable share_rows(const Variable& w, const std::vector<SharedRows>& rows, int64_t whole, const comm::GroupPtr& group);

}  // namespace autograd
}  // namespace krait

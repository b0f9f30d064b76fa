#pragma once
#include "autograd/variable.h"
#include "core/comm/process_group.h"

namespace krait {
inline namespace autograd {

/// RMSNorm of x silu(z) over each of `groups` groups of channels, times w; with norm_first the gate multiplies the
/// normalised x instead. See kernels/gated_rms_norm.h.
Variable gated_rms_norm(const Variable& x, const Variable& z, const Variable& w, double eps, int64_t groups = 1,
                        bool norm_first = false);

/// The same where the channels of every group are spread evenly over the members of a process group: the channels here
/// belong to group `own` of `groups`, as do those of size() / groups members. The members exchange a number of each row
/// and group.
Variable gated_rms_norm_over(const Variable& x, const Variable& z, const Variable& w, double eps, int64_t groups,
                             int64_t own, bool norm_first, const comm::GroupPtr& group);

}  // namespace autograd
}  // namespace krait

#pragma once
#include "autograd/variable.h"
#include "core/comm/process_group.h"
#include "kernels/gated_rms_norm.h"

namespace krait {
inline namespace autograd {

/// RMSNorm of x silu(z) over each of `groups` groups of channels, times w; with norm_first the gate multiplies the
/// normalised x instead. See kernels/gated_rms_norm.h.
Variable gated_rms_norm(const Variable& x, const Variable& z, const Variable& w, double eps, int64_t groups = 1,
                        bool norm_first = false);

/// What a process has of the groups: all channels of each (group undefined or of one), or with several members a share of
/// those of group `own` of `groups`, which it has in common with size() / groups members.
struct NormMembers {
  comm::GroupPtr group = {};
  int64_t groups = 1, own = 0;
  bool several() const { return group && group->size() > 1; }
};

/// The kernels of the norm, with what the members exchange between them, for functions that call them themselves: a number
/// of each row and group in each direction. `groups` of the channels here.
struct GatedNorm {
  NormMembers members = {};
  int64_t groups = 1;
  double eps = 1e-5;
  bool norm_first = false;

  kernels::GatedRmsNormOut forward(const Tensor& x, const Tensor& z, const Tensor& w) const;
  /// dw_into, dz_into, y_again: kernels/gated_rms_norm.h.
  kernels::GatedRmsNormGrad backward(const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& w, const Tensor& rstd,
                                     const Tensor& dw_into = {}, const Tensor& dz_into = {}, bool y_again = false) const;

 private:
  Tensor mean(const Tensor& sums, int64_t channels) const;
};

}  // namespace autograd
}  // namespace krait

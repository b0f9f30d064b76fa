#include "autograd/gated_rms_norm.h"

#include "kernels/elementwise.h"
#include "kernels/gated_rms_norm_split.h"

namespace krait::autograd {

// Of all members' channels of each group, from the sums over those here (rows, groups).
Tensor GatedNorm::mean(const Tensor& sums, int64_t channels) const {
  // Each member's part in its group's place: one sum serves all groups.
  Tensor all = sums;
  if (members.groups > 1) {
    all = zeros({members.groups, sums.size(0)}, sums.dtype(), sums.device());
    Tensor place = all.slice(0, members.own, members.own + 1).view(sums.shape());
    copy_(place, sums);
  }
  members.group->all_reduce(all).wait();
  const Tensor own = members.groups > 1 ? all.slice(0, members.own, members.own + 1).view(sums.shape()) : all;
  return kernels::mul_scalar(own, static_cast<double>(members.groups) / static_cast<double>(channels * members.group->size()));
}

kernels::GatedRmsNormOut GatedNorm::forward(const Tensor& x, const Tensor& z, const Tensor& w) const {
  if (!members.several()) return kernels::gated_rms_norm_forward(x, z, w, eps, groups, norm_first);
  KRAIT_ASSERT(groups == 1, "a member of several has {} groups.", groups);
  const Tensor square = mean(kernels::gated_rms_norm_squares(x, z, groups, norm_first), x.size(-1));
  const Tensor rstd = kernels::rsqrt(kernels::add_scalar(square, eps));
  return {kernels::gated_rms_norm_apply(x, z, w, rstd), rstd};
}

kernels::GatedRmsNormGrad GatedNorm::backward(const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& w,
                                              const Tensor& rstd, const Tensor& dw_into, const Tensor& dz_into,
                                              bool y_again) const {
  if (!members.several())
    return kernels::gated_rms_norm_backward(dy, x, z, w, rstd, norm_first, dw_into, dz_into, y_again);
  const Tensor dot = mean(kernels::gated_rms_norm_dots(dy, x, z, w, rstd), x.size(-1));
  return kernels::gated_rms_norm_backward_split(dy, x, z, w, rstd, dot, norm_first, dw_into, dz_into, y_again);
}

Variable gated_rms_norm(const Variable& x, const Variable& z, const Variable& w, double eps, int64_t groups,
                        bool norm_first) {
  const GatedNorm norm{{}, groups, eps, norm_first};
  auto [y, rstd] = norm.forward(x.data(), z.data(), w.data());
  return record("gated_rms_norm", {x, z, w}, y,
                [norm, x = x.data(), z = z.data(), w, rstd = rstd](const Tensor& dy) -> Grads {
                  auto grad = norm.backward(dy, x, z, w.data(), rstd, w.grad_in_place());
                  return {grad.dx, grad.dz, grad.dw};
                });
}

}  // namespace krait::autograd

#include "autograd/gated_rms_norm.h"

#include "autograd/activation.h"
#include "autograd/collective.h"
#include "autograd/elementwise.h"
#include "autograd/reduce.h"
#include "autograd/shape.h"
#include "kernels/gated_rms_norm.h"

namespace krait::autograd {

Variable gated_rms_norm(const Variable& x, const Variable& z, const Variable& w, double eps, int64_t groups,
                        bool norm_first) {
  auto [y, rstd] = kernels::gated_rms_norm_forward(x.data(), z.data(), w.data(), eps, groups, norm_first);
  return record("gated_rms_norm", {x, z, w}, y,
                [x = x.data(), z = z.data(), w, rstd = rstd, norm_first](const Tensor& dy) -> Grads {
                  auto grad = kernels::gated_rms_norm_backward(dy, x, z, w.data(), rstd, norm_first,
                                                               w.grad_in_place());
                  return {grad.dx, grad.dz, grad.dw};
                });
}

Variable gated_rms_norm_over(const Variable& x, const Variable& z, const Variable& w, double eps, int64_t groups,
                             int64_t own, bool norm_first, const comm::GroupPtr& group) {
  const DType wide = accum_dtype(x.dtype());
  const Variable gate = silu(cast(z, wide)), v = norm_first ? cast(x, wide) : cast(x, wide) * gate;
  const auto width = static_cast<double>(x.size(-1) * group->size() / groups);
  // Each member's part of its group's mean square, in the group's place: one sum serves all groups.
  const Variable part = sum(square(v), -1, keepdim) / width;
  const auto gap = [&](int64_t n) { return Variable(zeros(part.shape().with(-1, n), wide, x.device())); };
  const Variable placed = groups == 1 ? part : concat({gap(own), part, gap(groups - own - 1)}, -1);
  const Variable all = copy_to_group(reduce_from_group(placed, group), group);
  const Variable y = v * rsqrt(slice(all, -1, own, own + 1) + eps) * cast(w, wide);
  return cast(norm_first ? y * gate : y, x.dtype());
}

}  // namespace krait::autograd

#include "autograd/gated_rms_norm.h"

#include "kernels/gated_rms_norm.h"

namespace krait::autograd {

Variable gated_rms_norm(const Variable& x, const Variable& z, const Variable& w, double eps, int64_t groups,
                        bool norm_first) {
  auto [y, rstd] = kernels::gated_rms_norm_forward(x.data(), z.data(), w.data(), eps, groups, norm_first);
  return record("gated_rms_norm", {x, z, w}, y,
                [x = x.data(), z = z.data(), w, rstd = rstd, norm_first](const Tensor& dy) -> Grads {
                  auto grad = kernels::gated_rms_norm_backward(dy, x, z, w.data(), rstd, norm_first,
                                                               w.accumulates_in_place() ? w.grad() : Tensor());
                  return {grad.dx, grad.dz, grad.dw};
                });
}

}  // namespace krait::autograd

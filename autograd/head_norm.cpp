#include "autograd/head_norm.h"

#include "kernels/head_norm.h"

namespace krait::autograd {

Variable head_norm(const Variable& x, const Variable& w, double eps) {
  auto [y, mean, rstd] = kernels::head_norm_forward(x.data(), w.data(), eps);
  return record("head_norm", {x, w}, y, [x = x.data(), w, mean = mean, rstd = rstd](const Tensor& dy) -> Grads {
    auto grad = kernels::head_norm_backward(dy, x, w.data(), mean, rstd, w.grad_in_place());
    return {grad.dx, grad.dw};
  });
}

}  // namespace krait::autograd

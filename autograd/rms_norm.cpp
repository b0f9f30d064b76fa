#include "autograd/rms_norm.h"

#include "kernels/rms_norm.h"

namespace krait::autograd {

Variable rms_norm(const Variable& x, const Variable& w, double eps) {
  auto [y, rstd] = kernels::rms_norm_forward(x.data(), w.data(), eps);
  return record("rms_norm", {x, w}, y, [x = x.data(), w, rstd = rstd](const Tensor& dy) -> Grads {
    auto grad = kernels::rms_norm_backward(dy, {}, x, w.data(), rstd, w.grad_in_place());
    return {grad.dx, grad.dw};
  });
}

AddNorm add_rms_norm(const Variable& x, const Variable& residual, const Variable& w, double eps) {
  auto [sum, y, rstd] = kernels::add_rms_norm_forward(x.data(), residual.data(), w.data(), eps);
  const Vars out = record("add_rms_norm", {x, residual, w}, {sum, y},
                          [sum = sum, w, rstd = rstd, dtype = x.dtype()](const std::vector<Tensor>& d) -> Grads {
                            if (!d[1].defined()) return {d[0].to(dtype), d[0], {}};
                            auto grad = kernels::rms_norm_backward(d[1], d[0], sum, w.data(), rstd,
                                                                   w.grad_in_place());
                            return {grad.dx, grad.dresidual, grad.dw};
                          });
  return {out[0], out[1]};
}

}  // namespace krait::autograd

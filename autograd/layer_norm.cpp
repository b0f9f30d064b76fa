#include "autograd/layer_norm.h"

#include "kernels/layer_norm.h"

namespace krait::autograd {

Variable layer_norm(const Variable& x, const Variable& w, const Variable& b, double eps, double weight_offset) {
  auto [y, mean, rstd] = kernels::layer_norm_forward(x.data(), w.data(), b.data(), eps, weight_offset);
  return record("layer_norm", {x, w, b}, y, [x = x.data(), w, b, mean = mean, rstd = rstd, weight_offset](const Tensor& dy) -> Grads {
    auto grad =
        kernels::layer_norm_backward(dy, {}, x, w.data(), b.data(), mean, rstd, w.grad_in_place(), b.grad_in_place(), weight_offset);
    return {grad.dx, grad.dw, grad.db};
  });
}

AddNorm add_layer_norm(const Variable& x, const Variable& residual, const Variable& w, const Variable& b, double eps,
                       double weight_offset) {
  auto [sum, y, mean, rstd] = kernels::add_layer_norm_forward(x.data(), residual.data(), w.data(), b.data(), eps, weight_offset);
  const Vars out = record(
      "add_layer_norm", {x, residual, w, b}, {sum, y},
      [sum = sum, w, b, mean = mean, rstd = rstd, dtype = x.dtype(), weight_offset](const std::vector<Tensor>& d) -> Grads {
        if (!d[1].defined()) return {d[0].to(dtype), d[0], {}, {}};
        auto grad = kernels::layer_norm_backward(d[1], d[0], sum, w.data(), b.data(), mean, rstd, w.grad_in_place(),
                                                 b.grad_in_place(), weight_offset);
        return {grad.dx, grad.dresidual, grad.dw, grad.db};
      });
  return {out[0], out[1]};
}

}  // namespace krait::autograd

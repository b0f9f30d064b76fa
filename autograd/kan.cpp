#include "autograd/kan.h"

#include "kernels/kan.h"

namespace krait::autograd {

namespace {

kernels::KanParameters values_of(const KanVariables& p) {
  return {p.base.data(), p.spline.data(), p.scaler.data(), p.grid, p.order};
}

using Backward = kernels::KanGrad (*)(const Tensor&, const Tensor&, const kernels::KanParameters&, kernels::KanWants);

Variable record_kan(std::string_view name, const Variable& x, const KanVariables& p, const Tensor& y,
                    Backward backward) {
  const kernels::KanWants wants{x.requires_grad(), p.base.requires_grad() || p.spline.requires_grad() ||
                                                       p.scaler.requires_grad()};
  return record(name, {x, p.base, p.spline, p.scaler}, y,
                [x = x.data(), p, values = values_of(p), wants, backward](const Tensor& dy) -> Grads {
                  const auto grad = backward(dy, x, values, wants);
                  // Sums are wider than bf16 weights; a gradient buffer takes them as they are.
                  const auto like = [](const Tensor& g, const Variable& v) {
                    if (!g.defined() || !v.requires_grad()) return Tensor();
                    return v.accumulates_in_place() ? g : g.to(v.dtype());
                  };
                  return {grad.dx, like(grad.base, p.base), like(grad.spline, p.spline), like(grad.scaler, p.scaler)};
                });
}

}  // namespace

Variable kan(const Variable& x, const KanVariables& p) {
  return record_kan("kan", x, p, kernels::kan_forward(x.data(), values_of(p)), kernels::kan_backward);
}

Variable kan_edges(const Variable& x, const KanVariables& p) {
  return record_kan("kan_edges", x, p, kernels::kan_edges_forward(x.data(), values_of(p)),
                    kernels::kan_edges_backward);
}

}  // namespace krait::autograd

#include "autograd/rope.h"

namespace krait::autograd {

namespace {

Variable rotate(const Variable& x, const Tensor& cos, const Tensor& sin, RopeStyle style, const Tensor& positions,
                int64_t offset) {
  return record("rope", {x}, kernels::rope(x.data(), cos, sin, style, positions, offset),
                [=](const Tensor& dy) -> Grads {
                  return {kernels::rope(dy, cos, sin, style, positions, offset, /*inverse=*/true)};
                });
}

}  // namespace

Variable rope(const Variable& x, const Tensor& cos, const Tensor& sin, RopeStyle style, const Tensor& positions) {
  return rotate(x, cos, sin, style, positions, 0);
}

Variable rope(const Variable& x, const Tensor& cos, const Tensor& sin, RopeStyle style, int64_t offset) {
  return rotate(x, cos, sin, style, Tensor(), offset);
}

Variable rope_heads_(const Variable& x, int64_t heads, const Tensor& cos, const Tensor& sin, RopeStyle style,
                     const Tensor& positions, int64_t offset) {
  const auto rotate_first = [=](const Tensor& t, bool inverse) {
    Tensor first = t.slice(2, 0, heads);
    kernels::rope_into(first, first, cos, sin, style, positions, offset, inverse);
  };
  const Tensor y = x.data();
  rotate_first(y, false);
  return record("rope_heads_", {x}, y, [=](const Tensor& dy) -> Grads {
    const Tensor dx = dy.use_count() == 1 ? dy : dy.clone();
    rotate_first(dx, true);
    return {dx};
  });
}

Variable linear_rope(const Variable& x, const Variable& w, const Variable& bias, int64_t heads, int64_t rotated,
                     const Tensor& cos, const Tensor& sin, RopeStyle style, int64_t offset) {
  const Tensor y = kernels::linear_rope(x.data(), w.data(), bias.data(), heads, rotated, cos, sin, style, offset);
  const kernels::LinearWants wants{x.requires_grad(), w.requires_grad(), bias.requires_grad()};
  return record("linear_rope", {x, w, bias}, y,
                [x = x.data(), w, weight = w.data(), bias, wants, rotated, cos, sin, style, offset](const Tensor& dy) -> Grads {
                  const Tensor d = dy.use_count() == 1 && dy.is_contiguous() ? dy : dy.clone();
                  Tensor first = d.slice(2, 0, rotated);
                  kernels::rope_into(first, first, cos, sin, style, Tensor(), offset, /*inverse=*/true);
                  const Tensor flat = d.view({d.size(0), d.size(1), d.size(2) * d.size(3)});
                  const Tensor dw_sum = w.grad_in_place(), db_sum = bias.grad_in_place();
                  auto [dx, dw, db] =
                      kernels::linear_backward(flat, x, weight, {}, kernels::Epilogue::none, wants, dw_sum, db_sum);
                  return {dx, dw_sum.defined() ? Tensor() : dw, db_sum.defined() ? Tensor() : db};
                });
}

}  // namespace krait::autograd

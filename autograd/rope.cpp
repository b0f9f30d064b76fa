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

}  // namespace krait::autograd

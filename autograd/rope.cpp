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

}  // namespace krait::autograd

#include "kernels/activation_dropout.h"

namespace krait::kernels {

Tensor activation_dropout_forward(const Tensor& x, Activation f, const DropoutMask& mask) {
  check_mask("activation_dropout", x, mask);
  Tensor y = empty_like(x);
  if (x.numel() > 0) KRAIT_DISPATCH(x.device(), activation_dropout_forward(y, x.contiguous(), f, mask));
  return y;
}

Tensor activation_dropout_backward(const Tensor& dy, const Tensor& x, Activation f, const DropoutMask& mask) {
  check_same("activation_dropout", dy, x);
  KRAIT_CHECK(dy.shape() == x.shape(), "activation_dropout: dy is {}, x is {}", dy.shape(), x.shape());
  check_mask("activation_dropout", x, mask);
  Tensor dx = empty_like(x);
  if (x.numel() > 0) KRAIT_DISPATCH(x.device(), activation_dropout_backward(dx, dy.contiguous(), x.contiguous(), f, mask));
  return dx;
}

}  // namespace krait::kernels

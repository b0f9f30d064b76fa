#include "kernels/activation_dropout.h"

namespace krait::kernels::cpu {

// Two passes: the first one's result is still in the cache only for small tensors, but both are quick beside the rest.
void activation_dropout_forward(Tensor& y, const Tensor& x, Activation f, const DropoutMask& mask) {
  const Tensor values = empty_like(x);
  Tensor out = values;
  activation_forward(out, x, f);
  dropout(y, values, {}, mask);
}

void activation_dropout_backward(Tensor& dx, const Tensor& dy, const Tensor& x, Activation f, const DropoutMask& mask) {
  Tensor kept = empty_like(dy);
  dropout(kept, dy, {}, mask);
  activation_backward(dx, kept, x, f);
}

}  // namespace krait::kernels::cpu

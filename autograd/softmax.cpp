#include "autograd/softmax.h"

#include "kernels/softmax.h"

namespace krait::autograd {

Variable softmax(const Variable& x) {
  const Tensor y = kernels::softmax_forward(x.data());
  return record("softmax", {x}, y, [y](const Tensor& dy) -> Grads { return {kernels::softmax_backward(dy, y)}; });
}

Variable log_softmax(const Variable& x) {
  const Tensor y = kernels::log_softmax_forward(x.data());
  return record("log_softmax", {x}, y,
                [y](const Tensor& dy) -> Grads { return {kernels::log_softmax_backward(dy, y)}; });
}

}  // namespace krait::autograd

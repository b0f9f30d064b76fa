#include "kernels/glu_linear.h"

#include "kernels/activation.h"
#include "kernels/linear.h"

namespace krait::kernels {

Tensor glu_linear(const Tensor& x_in, const Tensor& w_in, const Tensor& bias_in) {
  check_same("glu_linear", x_in, w_in);
  KRAIT_CHECK(x_in.ndim() == 2 && w_in.ndim() == 2 && w_in.size(0) % 2 == 0 && x_in.size(1) == w_in.size(1),
              "glu_linear: x is {}, the weight {}; expected (rows, in) and (2 out, in)", x_in.shape(), w_in.shape());
  if (bias_in.defined()) {
    check_same("glu_linear", x_in, bias_in);
    KRAIT_CHECK(bias_in.shape() == Shape{w_in.size(0)}, "glu_linear: the bias is {}, the weight {}", bias_in.shape(), w_in.shape());
  }
  const Tensor x = x_in.contiguous(), w = w_in.contiguous(), bias = bias_in.defined() ? bias_in.contiguous() : Tensor();
  Tensor y = empty({x.size(0), w.size(0) / 2}, x.dtype(), x.device());
  bool done = y.numel() == 0;
  if (!done && x.numel() > 0) KRAIT_DISPATCH_GPU(x.device(), glu_linear(done, y, x, w, bias));
  return done ? y : glu_packed_forward(linear_forward(x, w, bias, Epilogue::none, false).y, Activation::sigmoid, true);
}

}  // namespace krait::kernels

#include "kernels/gated_cnn_step.h"

#include "kernels/activation.h"
#include "kernels/causal_conv1d.h"

namespace krait::kernels {

namespace {

Tensor composed(Tensor& conv, const Tensor& projected, const Tensor& weight, const Tensor& bias) {
  const int64_t f = projected.size(1) / 2, c = weight.size(0);
  Tensor up = causal_conv1d_step(conv, projected.slice(1, 2 * f - c, 2 * f), weight, bias, false);
  if (c < f) {
    const Tensor both = empty({projected.size(0), f}, projected.dtype(), projected.device());
    Tensor plain = both.slice(1, 0, f - c), convolved = both.slice(1, f - c, f);
    copy_(plain, projected.slice(1, f, 2 * f - c));
    copy_(convolved, up);
    up = both;
  }
  return glu_forward(projected.slice(1, 0, f), up, Activation::gelu_erf);
}

}  // namespace

Tensor gated_cnn_step(Tensor& conv, const Tensor& projected_in, const Tensor& weight, const Tensor& bias) {
  check_same("gated_cnn_step", projected_in, weight, bias);
  check_same("gated_cnn_step", projected_in, conv);
  KRAIT_CHECK(projected_in.ndim() == 2 && projected_in.size(1) % 2 == 0 && weight.ndim() == 2 && weight.size(1) > 0 &&
                  weight.size(0) <= projected_in.size(1) / 2 && bias.shape() == Shape{weight.size(0)},
              "gated_cnn_step: the projection is {}, the filters {}, their bias {}", projected_in.shape(), weight.shape(), bias.shape());
  const Shape state{projected_in.size(0), weight.size(1) - 1, weight.size(0)};
  KRAIT_CHECK(conv.shape() == state && conv.is_contiguous(), "gated_cnn_step: the state is {}, expected contiguous {}", describe(conv), state);
  const Tensor projected = projected_in.contiguous(), filters = weight.contiguous(), shift = bias.contiguous();
  Tensor y = empty({projected.size(0), projected.size(1) / 2}, projected.dtype(), projected.device());
  bool done = y.numel() == 0;
  if (!done) KRAIT_DISPATCH_GPU(projected.device(), gated_cnn_step(done, y, conv, projected, filters, shift));
  return done ? y : composed(conv, projected, filters, shift);
}

}  // namespace krait::kernels

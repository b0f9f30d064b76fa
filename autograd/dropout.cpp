#include "autograd/dropout.h"

#include "autograd/elementwise.h"
#include "kernels/activation_dropout.h"

namespace krait::autograd {

namespace {
kernels::DropoutMask mask_for(const Variable& x, double p, std::string_view stream, const DropoutPart& part) {
  const RandomSource& source = current_random();
  kernels::DropoutMask mask{p, random_key(source.seed, stream), source.step};
  const int64_t per_sequence = x.ndim() == 0 || x.size(0) == 0 ? 1 : x.data().numel() / x.size(0);
  const bool whole = (part.length == 0 || (x.ndim() > 1 && part.length == x.size(1))) &&
                     (part.channels == 0 || (x.ndim() > 2 && part.channels == x.size(2)));
  if (whole) {
    mask.offset = source.batch_offset * per_sequence;
    return mask;
  }
  KRAIT_CHECK(x.ndim() == 3, "dropout: x is {}, expected (b, l, c) for a part of something larger", x.shape());
  const int64_t l = x.size(1), c = x.size(2);
  const int64_t length = part.length == 0 ? l : part.length, channels = part.channels == 0 ? c : part.channels;
  KRAIT_CHECK(part.position + l <= length && part.channel + c <= channels,
              "dropout: positions from {} and channels from {} of {} do not lie in ({}, {})", part.position, part.channel,
              x.shape(), length, channels);
  mask.offset = (source.batch_offset * length + part.position) * channels + part.channel;
  mask.group_stride = length * channels;
  if (c == channels) {
    mask.run = l * c;
  } else {
    mask.run = c;
    mask.runs = l;
    mask.run_stride = channels;
  }
  return mask;
}
}  // namespace

Variable dropout(const Variable& x, double p, std::string_view stream, const DropoutPart& part) {
  if (p == 0.0) return x;
  const auto mask = mask_for(x, p, stream, part);
  return record("dropout", {x}, kernels::dropout(x.data(), mask),
                [mask](const Tensor& dy) -> Grads { return {kernels::dropout(dy, mask)}; });
}

Variable gelu_dropout(const Variable& x, GeluForm form, double p, std::string_view stream, const DropoutPart& part) {
  if (p == 0.0) return gelu(x, form);
  const auto mask = mask_for(x, p, stream, part);
  const auto f = form == GeluForm::tanh ? kernels::Activation::gelu_tanh : kernels::Activation::gelu_erf;
  return record("gelu_dropout", {x}, kernels::activation_dropout_forward(x.data(), f, mask),
                [x = x.data(), f, mask](const Tensor& dy) -> Grads {
                  return {kernels::activation_dropout_backward(dy, x, f, mask)};
                });
}

Variable dropout_add(const Variable& x, const Variable& residual, double p, std::string_view stream,
                     const DropoutPart& part) {
  if (p == 0.0) return add(residual, x);
  const auto mask = mask_for(x, p, stream, part);
  return record("dropout_add", {x, residual}, kernels::dropout_add(x.data(), residual.data(), mask),
                [mask, wanted = x.requires_grad()](const Tensor& dy) -> Grads {
                  return {wanted ? kernels::dropout(dy, mask) : Tensor(), dy};
                });
}

}  // namespace krait::autograd

#include "kernels/mamba2_step.h"

namespace krait::kernels {

namespace {

Tensor step(Tensor& conv, Tensor& h, RecentPositions* recent, const Tensor& zxbcdt, const Mamba2StepWeights& w) {
  KRAIT_CHECK(h.ndim() == 4 && zxbcdt.ndim() == 2, "mamba2_step: the state is {}, the input {}", h.shape(), zxbcdt.shape());
  const int64_t b = zxbcdt.size(0), heads = h.size(1), p = h.size(2), n = h.size(3), e = heads * p;
  const int64_t channels = w.conv_weight.size(0);
  KRAIT_CHECK(channels > e && (channels - e) % (2 * n) == 0 && heads % ((channels - e) / (2 * n)) == 0,
              "mamba2_step: {} channels of the convolution do not fit a state {}", channels, h.shape());
  KRAIT_CHECK(zxbcdt.size(1) == e + channels + heads && h.size(0) == b, "mamba2_step: the input is {}, expected ({}, {})",
              zxbcdt.shape(), h.size(0), e + channels + heads);
  check_same("mamba2_step", zxbcdt, conv, w.conv_weight);
  check_same("mamba2_step", w.dt_bias, w.A_log, w.D, w.norm_weight);
  KRAIT_CHECK(w.D.shape() == Shape{heads} || w.D.shape() == (Shape{heads, p}), "mamba2_step: D is {}, expected ({}) or ({}, {})",
              w.D.shape(), heads, heads, p);
  KRAIT_CHECK(h.device() == zxbcdt.device() && (h.dtype() == accum_dtype(zxbcdt.dtype()) || (recent != nullptr && h.dtype() == DType::bf16)),
              "mamba2_step: the state is {}, the input {}", describe(h), describe(zxbcdt));
  KRAIT_CHECK(conv.shape() == (Shape{b, w.conv_weight.size(1) - 1, channels}), "mamba2_step: the convolution's state is {}, its filter {}",
              conv.shape(), w.conv_weight.shape());
  KRAIT_CHECK(conv.is_contiguous() && h.is_contiguous(), "mamba2_step: states must be contiguous");
  Tensor y = empty({b, e}, zxbcdt.dtype(), zxbcdt.device());
  if (y.numel() == 0) return y;
  Mamba2StepWeights whole = w;
  for (Tensor* t : {&whole.conv_weight, &whole.dt_bias, &whole.A_log, &whole.D, &whole.norm_weight}) *t = t->contiguous();
  if (whole.conv_bias.defined()) whole.conv_bias = whole.conv_bias.contiguous();
  KRAIT_DISPATCH(zxbcdt.device(), mamba2_step(y, conv, h, recent, zxbcdt.contiguous(), whole));
  return y;
}

}  // namespace

Tensor mamba2_step(Tensor& conv, Tensor& h, const Tensor& zxbcdt, const Mamba2StepWeights& w) { return step(conv, h, nullptr, zxbcdt, w); }

Tensor mamba2_step(Tensor& conv, Tensor& h, RecentPositions& recent, const Tensor& zxbcdt, const Mamba2StepWeights& w) {
  return step(conv, h, &recent, zxbcdt, w);
}

RecentPositions recent_positions(const Tensor& h, const Tensor& conv, const Mamba2StepWeights& w) {
  constexpr int64_t kSize = 16;  // reading what is recent costs about what h's writes still do
  constexpr int64_t kMostChannels = 4096;
  const Device device = h.device();
  if (h.ndim() != 4 || conv.ndim() != 3 || !device.is_cuda() || device_info(device).compute_capability < 80) return {};
  const int64_t b = h.size(0), heads = h.size(1), p = h.size(2), n = h.size(3);
  const bool served = conv.dtype() == DType::bf16 && n == 128 && p % 8 == 0 && p <= 64 && heads % 8 == 0 && heads * p <= kMostChannels &&
                      b < 65536 && conv.size(1) == 3 && conv.size(2) == heads * p + 2 * n && !w.norm_first;
  if (!served) return {};
  return {zeros({b, heads, kSize, p}, conv.dtype(), device), zeros({b, kSize, n}, conv.dtype(), device),
          zeros({b, heads, kSize, 2}, DType::f32, device), zeros({b, heads}, DType::i32, device)};
}

}  // namespace krait::kernels

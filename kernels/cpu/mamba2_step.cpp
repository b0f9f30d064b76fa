#include "kernels/mamba2_step.h"

#include "kernels/causal_conv1d.h"
#include "kernels/elementwise.h"
#include "kernels/gated_rms_norm.h"
#include "kernels/ssd.h"

namespace krait::kernels::cpu {

void mamba2_step(Tensor& y, Tensor& conv, Tensor& h, RecentPositions* recent, const Tensor& zxbcdt, const Mamba2StepWeights& w) {
  KRAIT_CHECK(recent == nullptr, "mamba2_step: a state behind its positions is a GPU's");
  const int64_t b = h.size(0), heads = h.size(1), p = h.size(2), n = h.size(3), e = heads * p;
  const int64_t channels = w.conv_weight.size(0), g = (channels - e) / (2 * n);
  const Tensor mixed = causal_conv1d_step(conv, zxbcdt.slice(1, e, e + channels), w.conv_weight, w.conv_bias, true);
  const Tensor raw = zxbcdt.slice(1, e + channels, e + channels + heads).to(h.dtype());
  const Tensor dt = kernels::clamp(kernels::softplus(kernels::add(raw, w.dt_bias)), w.dt_low, w.dt_high);
  const Tensor u = kernels::ssd_step(h, mixed.slice(1, 0, e).view({b, heads, p}), dt, kernels::neg(kernels::mul(kernels::exp(w.A_log), dt)),
                            mixed.slice(1, e, e + g * n).view({b, g, n}), mixed.slice(1, e + g * n, channels).view({b, g, n}), w.D);
  copy_(y, kernels::gated_rms_norm_forward(u.view({b, e}), zxbcdt.slice(1, 0, e), w.norm_weight, w.eps, g, w.norm_first).y);
}

}  // namespace krait::kernels::cpu

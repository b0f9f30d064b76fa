#include "kernels/mamba_step.h"

namespace krait::kernels {

Tensor mamba_step(Tensor& conv, Tensor& h, const Tensor& xz, const MambaStepWeights& w) {
  const int64_t e = w.A_log.size(0), n = w.A_log.size(1), r = w.dt_proj.size(1);
  KRAIT_CHECK(xz.ndim() == 2 && xz.size(1) == 2 * e, "mamba_step: xz is {}, expected (b, {})", xz.shape(), 2 * e);
  const int64_t b = xz.size(0);
  check_same("mamba_step", xz, conv, w.conv_weight, w.x_proj, w.dt_proj);
  check_same("mamba_step", h, w.dt_bias, w.A_log, w.D);
  KRAIT_CHECK(h.dtype() == accum_dtype(xz.dtype()) && h.shape() == (Shape{b, e, n}), "mamba_step: the state is {}, expected {} {}",
              describe(h), accum_dtype(xz.dtype()), Shape{b, e, n});
  KRAIT_CHECK(conv.shape() == (Shape{b, w.conv_weight.size(1) - 1, e}) && w.conv_weight.size(0) == e,
              "mamba_step: the convolution's state is {}, its filter {}", conv.shape(), w.conv_weight.shape());
  KRAIT_CHECK(w.x_proj.shape() == (Shape{r + 2 * n, e}) && w.dt_proj.size(0) == e, "mamba_step: x_proj is {}, dt_proj {}",
              w.x_proj.shape(), w.dt_proj.shape());
  KRAIT_CHECK(conv.is_contiguous() && h.is_contiguous(), "mamba_step: states must be contiguous");
  Tensor y = empty({b, e}, xz.dtype(), xz.device());
  if (y.numel() == 0) return y;
  const MambaStepWeights whole{w.conv_weight.contiguous(), w.conv_bias.defined() ? w.conv_bias.contiguous() : Tensor{},
                               w.x_proj.contiguous(), w.dt_proj.contiguous(), w.dt_bias.contiguous(), w.A_log.contiguous(),
                               w.D.contiguous()};
  KRAIT_DISPATCH(xz.device(), mamba_step(y, conv, h, xz.contiguous(), whole));
  return y;
}

}  // namespace krait::kernels

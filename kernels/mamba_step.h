#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait::kernels {

/// What lies between Mamba's two projections, for one position (Gu & Dao 2023; kernels/causal_conv1d.h and
/// kernels/selective_scan.h for sequences):
///   [x; z] = xz    x~ = silu(conv(x))    [d; B; C] = x_proj x~    delta = softplus(dt_proj d + dt_bias)
///   h = exp(-delta e^A_log) h + delta B x~        y = (C h + D x~) silu(z)
/// conv (b, k - 1, e), like xz, and h (b, e, n), in the dtype of sums, advance in place at their addresses.
/// xz (b, 2 e) and the weights conv_weight (e, k), conv_bias (e) or undefined, x_proj (r + 2 n, e), dt_proj (e, r):
/// fp32, bf16 or fp64, alike; dt_bias (e), A_log (e, n), D (e) in the dtype of sums. y (b, e) like xz; x~, d, B, C and
/// dt_proj d are rounded to its dtype, as in the parallel form.
struct MambaStepWeights {
  Tensor conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D;
};
Tensor mamba_step(Tensor& conv, Tensor& h, const Tensor& xz, const MambaStepWeights& w);

// Backends: everything contiguous.
KRAIT_BACKENDS(void mamba_step(Tensor& y, Tensor& conv, Tensor& h, const Tensor& xz, const MambaStepWeights& w))

}  // namespace krait::kernels

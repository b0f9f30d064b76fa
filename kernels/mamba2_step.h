#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait::kernels {

/// What lies between Mamba-2's two projections, for one position (Dao & Gu 2024, section 7; kernels/ssd.h and
/// kernels/gated_rms_norm.h for sequences). With heads of p channels, e = heads p, g groups of n states:
///   [z; xBC; dt] = zxbcdt     [x; B; C] = silu(conv(xBC))     dt' = clamp(softplus(dt + dt_bias), low, high)
///   h = exp(-e^A_log dt') h + dt' x (x) B        u = h C + D x        y = GatedRMSNorm(u, z) norm_weight
/// conv (b, k - 1, e + 2 g n), like zxbcdt, and h (b, heads, p, n), in the dtype of sums, advance in place.
/// zxbcdt (b, 2 e + 2 g n + heads), conv_weight (e + 2 g n, k), conv_bias or undefined: fp32, bf16 or fp64, alike; the
/// rest in the dtype of sums, D (heads) or (heads, p). y (b, e) like zxbcdt; x, B, C and u are rounded to its dtype.
struct Mamba2StepWeights {
  Tensor conv_weight, conv_bias, dt_bias, A_log, D, norm_weight;
  double dt_low = 0, dt_high = 0, eps = 1e-5;
  bool norm_first = false;
};
Tensor mamba2_step(Tensor& conv, Tensor& h, const Tensor& zxbcdt, const Mamba2StepWeights& w);

/// Positions that h has not taken in: with them a step reads h and writes it once in `size` positions, all at once, so
/// that h may be bf16 and is rounded that seldom. The same numbers up to rounding. On GPUs, for what recent_positions()
/// allows.
struct RecentPositions {
  Tensor x, B;   // (b, heads, size, p), (b, size, n), like zxbcdt
  Tensor steps;  // (b, heads, size, 2) fp32: dt', and the logarithm of the decays' product since h
  Tensor count;  // (b, heads) int32
};
Tensor mamba2_step(Tensor& conv, Tensor& h, RecentPositions& recent, const Tensor& zxbcdt, const Mamba2StepWeights& w);
/// None yet, for a state h and steps with w; undefined where such steps are not served.
RecentPositions recent_positions(const Tensor& h, const Tensor& conv, const Mamba2StepWeights& w);

// Backends: everything contiguous; recent may be null.
KRAIT_BACKENDS(void mamba2_step(Tensor& y, Tensor& conv, Tensor& h, RecentPositions* recent, const Tensor& zxbcdt, const Mamba2StepWeights& w))

}  // namespace krait::kernels

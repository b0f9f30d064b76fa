#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// RMSNorm over the last dimension (Zhang & Sennrich 2019, eq. 4; eps added under the root).
/// With r rows (all leading dimensions) of c values:
///   rstd[r] = (mean_c x[r,c]^2 + eps)^(-1/2)         y[r,c] = x[r,c] rstd[r] w[c]
/// Backward, with g = dy w and xhat = x rstd:
///   dx = rstd (g - xhat mean_c(g xhat))              dw[c] = sum_r dy xhat
/// The fused residual form normalises r' = x + residual (rounded to the residual's dtype) and returns r' too; its
/// backward adds dr', the gradient of r' from elsewhere.
struct RmsNormOut { Tensor y, rstd; };
struct AddRmsNormOut { Tensor residual, y, rstd; };
/// dx in the dtype of the incoming dy; dresidual in that of the normalised tensor (the same tensor if they agree).
struct RmsNormGrad { Tensor dx, dresidual, dw; };

/// x (..., c): fp32, bf16 or fp64; w (c): x's dtype or fp32 (fp32 is read as it is, bf16 is converted first).
/// y like x, rounded once from fp32. rstd (...) is fp32 (fp64 for fp64), as are all sums; it serves the backward.
RmsNormOut rms_norm_forward(const Tensor& x, const Tensor& w, double eps);
/// residual like x, or fp32 with bf16 x; r' like residual, y like x.
AddRmsNormOut add_rms_norm_forward(const Tensor& x, const Tensor& residual, const Tensor& w, double eps);

/// `x` is what was normalised: x, or r' of the fused form. dr (like x) may be undefined.
/// With dw_into (a gradient buffer) dw is added there and returned undefined.
/// dw is summed in a fixed order: equal inputs give equal bits.
RmsNormGrad rms_norm_backward(const Tensor& dy, const Tensor& dr, const Tensor& x, const Tensor& w, const Tensor& rstd,
                              const Tensor& dw_into = {});

// Backends: everything contiguous, w and dw in the dtype of sums. sum and residual are undefined in the plain form;
// dx is undefined when dr's dtype is dy's. dw = or += (add_dw) the sum.
KRAIT_BACKENDS(
    void rms_norm_forward(Tensor& y, Tensor& sum, Tensor& rstd, const Tensor& x, const Tensor& residual,
                          const Tensor& w, double eps);
    void rms_norm_backward(Tensor& dresidual, Tensor& dx, Tensor& dw, bool add_dw, const Tensor& dy, const Tensor& dr,
                           const Tensor& x, const Tensor& w, const Tensor& rstd))

}  // namespace kernels
}  // namespace krait

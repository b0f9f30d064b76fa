#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// LayerNorm of each head with weights of its own (group normalisation, Wu & He 2018, over one position; the
/// multi-head norm of xLSTM, Beck et al. 2024). With r rows (all leading dimensions) of h heads of p values:
///   mean[r,h] = mean_p x     rstd[r,h] = (mean_p (x - mean)^2 + eps)^(-1/2)     y = (x - mean) rstd w[h,p]
/// Backward, with g = dy w and xhat = (x - mean) rstd:
///   dx = rstd (g - mean_p g - xhat mean_p(g xhat))     dw[h,p] = sum_r dy xhat
struct HeadNormOut { Tensor y, mean, rstd; };
struct HeadNormGrad { Tensor dx, dw; };

/// x (..., h, p): fp32, bf16 or fp64; w (h p): x's dtype or fp32. y like x; mean and rstd (..., h) fp32 (fp64 for
/// fp64), as are all sums.
HeadNormOut head_norm_forward(const Tensor& x, const Tensor& w, double eps);
/// With dw_into (a gradient buffer) dw is added there and returned undefined. Sums run in a fixed order.
HeadNormGrad head_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& w, const Tensor& mean,
                                const Tensor& rstd, const Tensor& dw_into = {});

// Backends: everything contiguous and not empty, w and dw in the dtype of sums. dw = or += (add_dw) the sum.
KRAIT_BACKENDS(
    void head_norm_forward(Tensor& y, Tensor& mean, Tensor& rstd, const Tensor& x, const Tensor& w, double eps);
    void head_norm_backward(Tensor& dx, Tensor& dw, bool add_dw, const Tensor& dy, const Tensor& x, const Tensor& w,
                            const Tensor& mean, const Tensor& rstd))

}  // namespace kernels
}  // namespace krait

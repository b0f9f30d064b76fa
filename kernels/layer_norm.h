#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// LayerNorm over the last dimension (Ba et al. 2016; biased variance). With r rows of c values:
///   mean[r] = mean_c x     rstd[r] = (mean_c (x - mean)^2 + eps)^(-1/2)     y = (x - mean) rstd (w + weight_offset) + b
/// Backward, with g = dy (w + weight_offset) and xhat = (x - mean) rstd:
///   dx = rstd (g - mean_c g - xhat mean_c(g xhat))     dw[c] = sum_r dy xhat     db[c] = sum_r dy
/// The variance comes from deviations of a first mean, never from E[x^2] - mean^2.
/// The fused residual form normalises r' = x + residual (rounded to the residual's dtype) and returns r' too; its
/// backward adds dr', the gradient of r' from elsewhere.
struct LayerNormOut { Tensor y, mean, rstd; };
struct AddLayerNormOut { Tensor residual, y, mean, rstd; };
/// dx in the dtype of the incoming dy; dresidual in that of the normalised tensor (the same tensor if they agree).
struct LayerNormGrad { Tensor dx, dresidual, dw, db; };

/// x (..., c): fp32, bf16 or fp64; w, b (c): x's dtype or fp32; b may be undefined (zero).
/// y like x, rounded once from fp32. mean and rstd (...) are fp32 (fp64 for fp64), as are all sums.
LayerNormOut layer_norm_forward(const Tensor& x, const Tensor& w, const Tensor& b, double eps, double weight_offset = 0);
/// residual like x, or fp32 with bf16 x; r' like residual, y like x.
AddLayerNormOut add_layer_norm_forward(const Tensor& x, const Tensor& residual, const Tensor& w, const Tensor& b,
                                       double eps, double weight_offset = 0);

/// `x` is what was normalised: x, or r' of the fused form. dr (like x) may be undefined; b only says whether db is
/// wanted and in which dtype. With dw_into / db_into (gradient buffers) the sums are added there and returned
/// undefined. Sums run in a fixed order: equal inputs give equal bits.
LayerNormGrad layer_norm_backward(const Tensor& dy, const Tensor& dr, const Tensor& x, const Tensor& w, const Tensor& b,
                                  const Tensor& mean, const Tensor& rstd, const Tensor& dw_into = {},
                                  const Tensor& db_into = {}, double weight_offset = 0);

// Backends: everything contiguous, w, b, dw, db in the dtype of sums. sum and residual are undefined in the plain
// form; dx is undefined when dr's dtype is dy's; b and db may be undefined. dw = or += (add_dw) the sum.
KRAIT_BACKENDS(
    void layer_norm_forward(Tensor& y, Tensor& sum, Tensor& mean, Tensor& rstd, const Tensor& x,
                            const Tensor& residual, const Tensor& w, const Tensor& b, double eps, double weight_offset);
    void layer_norm_backward(Tensor& dresidual, Tensor& dx, Tensor& dw, bool add_dw, Tensor& db, bool add_db,
                             const Tensor& dy, const Tensor& dr, const Tensor& x, const Tensor& w, const Tensor& mean,
                             const Tensor& rstd, double weight_offset))

}  // namespace kernels
}  // namespace krait

#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// RMSNorm with a gate, over `groups` equal groups of the last dimension (Dao & Gu 2024, section 7.1).
/// With r rows, groups of c values, s = silu(z):
///   gate first:  u = x s   rstd = (mean_c u^2 + eps)^(-1/2)   y = u rstd w
///   norm first:            rstd = (mean_c x^2 + eps)^(-1/2)   y = x rstd w s
/// Backward, with t = dy (gate first) or dy s (norm first), v = u or x, vhat = v rstd, g = t w:
///   dv = rstd (g - vhat mean_c(g vhat))     dw = sum_r t vhat
///   gate first: dx = dv s, dz = dv x silu'(z);   norm first: dx = dv, dz = dy vhat w silu'(z)
struct GatedRmsNormOut { Tensor y, rstd; };
struct GatedRmsNormGrad { Tensor dx, dz, dw, y; };

/// x, z (..., e): fp32, bf16 or fp64; rows of z may be apart (a slice of a wider projection). w (e): x's dtype or that
/// of sums. y like x, rounded once; rstd (rows, groups) and sums in fp32 (fp64 for fp64).
GatedRmsNormOut gated_rms_norm_forward(const Tensor& x, const Tensor& z, const Tensor& w, double eps, int64_t groups,
                                       bool norm_first);
/// With dw_into (a gradient buffer) dw is added there and returned undefined. dw is summed in a fixed order. dz_into (like
/// z; its rows may be apart) receives dz. With y_again y is made again on the way.
GatedRmsNormGrad gated_rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& w,
                                         const Tensor& rstd, bool norm_first, const Tensor& dw_into = {},
                                         const Tensor& dz_into = {}, bool y_again = false);

// Backends: matrices (r, e) that are contiguous but for the rows of z and dz; w and dw in the dtype of sums; y may be
// undefined in the backward.
KRAIT_BACKENDS(
    void gated_rms_norm_forward(Tensor& y, Tensor& rstd, const Tensor& x, const Tensor& z, const Tensor& w, double eps,
                                bool norm_first);
    void gated_rms_norm_backward(Tensor& dx, Tensor& dz, Tensor& y, Tensor& dw, bool add_dw, const Tensor& dy,
                                 const Tensor& x, const Tensor& z, const Tensor& w, const Tensor& rstd,
                                 bool norm_first))

}  // namespace kernels
}  // namespace krait

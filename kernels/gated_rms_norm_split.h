#pragma once
#include "kernels/gated_rms_norm.h"

namespace krait {
namespace kernels {

/// The gated RMSNorm (kernels/gated_rms_norm.h, whose letters these are) where the channels of a group lie on several
/// processes: what each computes of its own channels, before and after all exchange a number of each row and group.
///   squares = sum_c v^2           rstd = (sum of all squares / width + eps)^(-1/2)         y = x s rstd w
///   dots = sum_c g vhat = sum_c dy y                             dv = rstd (g - vhat mean), mean = sum of all dots / width
/// Tensors as there; squares, rstd, dots and mean (rows, groups) in the dtype of sums.
Tensor gated_rms_norm_squares(const Tensor& x, const Tensor& z, int64_t groups, bool norm_first);
Tensor gated_rms_norm_apply(const Tensor& x, const Tensor& z, const Tensor& w, const Tensor& rstd);
Tensor gated_rms_norm_dots(const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& w, const Tensor& rstd);
/// dw_into, dz_into and y_again: as of gated_rms_norm_backward.
GatedRmsNormGrad gated_rms_norm_backward_split(const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& w,
                                               const Tensor& rstd, const Tensor& mean, bool norm_first,
                                               const Tensor& dw_into = {}, const Tensor& dz_into = {}, bool y_again = false);

// Backends: matrices (r, e), contiguous but for the rows of z and dz; w and dw in the dtype of sums; y may be undefined in
// the backward.
KRAIT_BACKENDS(
    void gated_rms_norm_squares(Tensor& squares, const Tensor& x, const Tensor& z, bool norm_first);
    void gated_rms_norm_apply(Tensor& y, const Tensor& x, const Tensor& z, const Tensor& w, const Tensor& rstd);
    void gated_rms_norm_dots(Tensor& dots, const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& w,
                             const Tensor& rstd);
    void gated_rms_norm_backward_split(Tensor& dx, Tensor& dz, Tensor& y, Tensor& dw, bool add_dw, const Tensor& dy,
                                       const Tensor& x, const Tensor& z, const Tensor& w, const Tensor& rstd,
                                       const Tensor& mean, bool norm_first))

}  // namespace kernels
}  // namespace krait

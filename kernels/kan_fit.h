#pragma once
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// Spline fits and knots of KAN layers (Liu et al. 2024, section 2.4). All work in fp64 on the CPU, between training
/// steps: inputs of any dtype and device, results fp64 CPU. Knots (i, G + 2k + 1), coefficients (o, i, G + k),
/// samples x (s, i).

/// Knots lo + (hi - lo) / G (j - k), the same for every input.
Tensor uniform_knots(int64_t inputs, int64_t intervals, int64_t order, double low, double high);

/// Coefficients c of least squares (B^T B + lambda I) c = B^T y per input, with B the bases at the samples and
/// y (s, i, o). B^T B has k superdiagonals: banded Cholesky.
Tensor fit_splines(const Tensor& x, const Tensor& y, const Tensor& knots, int64_t order, double lambda = 1e-8);

/// fit_splines on `to` of the values that `coefficients` on the knots `from` have at the samples.
Tensor refit_splines(const Tensor& x, const Tensor& coefficients, const Tensor& from, const Tensor& to, int64_t order,
                     double lambda = 1e-8);

/// Knots of a finer (or coarser) grid over the same inner range: uniform rows stay uniform; else the inner knots are
/// interpolated linearly in their index. The k knots beyond either end keep the step of the end's interval.
Tensor resized_knots(const Tensor& knots, int64_t order, int64_t intervals);

/// Knots that follow the samples: eps uniform + (1 - eps) adaptive, where the adaptive inner knot j is sample
/// floor(j (s-1) / G) of the sorted column and the uniform ones span [min - margin, max + margin]; continued by k
/// knots of the uniform step. Knots keep a distance of at least 1e-6 (max - min) (1e-6 if all samples are equal).
Tensor knots_from_samples(const Tensor& x, int64_t intervals, int64_t order, double eps = 0.02, double margin = 0.01);

}  // namespace kernels
}  // namespace krait

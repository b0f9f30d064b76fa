#pragma once
#include <vector>

#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

// Reductions over a list of dimensions (negative ones count from the end; none given: all of them).
// fp32, fp64 or bf16, any strides; summed in fp32 (fp64 for fp64) in an order that depends on the shape alone.
// The reduced dimensions disappear, or stay with size 1 when `keep` is set.
using Dims = std::vector<int64_t>;
Tensor sum(const Tensor& x, const Dims& dims = {}, bool keep = false);
Tensor mean(const Tensor& x, const Dims& dims = {}, bool keep = false);  // of nothing: NaN
Tensor amax(const Tensor& x, const Dims& dims = {}, bool keep = false);  // NaN wins; of nothing: an error
Tensor amin(const Tensor& x, const Dims& dims = {}, bool keep = false);
/// log sum exp(x), without overflow; of nothing: -infinity.
Tensor logsumexp(const Tensor& x, const Dims& dims = {}, bool keep = false);
/// Index (int64) of the first maximum along a dimension.
Tensor argmax(const Tensor& x, int64_t dim, bool keep = false);

/// Sums a tensor back to a shape that broadcasts to its own: the gradient of broadcasting.
Tensor sum_to(const Tensor& x, const Shape& shape);

/// The shape of x reduced over dims.
Shape reduced_shape(const Shape& shape, const Dims& dims, bool keep);

// x (o, r, i) contiguous and not empty, y (o, i). amax and amin: y of x's dtype.
// sum: y = scale sum_r x. sum_exp: y = sum_r exp(x - shift), shift (o, i) and y of accum_dtype(x).
// argmax: x (o, r), y (o) int64.
KRAIT_BACKENDS(void sum(Tensor& y, const Tensor& x, double scale); void amax(Tensor& y, const Tensor& x);
               void amin(Tensor& y, const Tensor& x);
               void sum_exp(Tensor& y, const Tensor& x, const Tensor& shift);
               void argmax(Tensor& y, const Tensor& x))

}  // namespace kernels
}  // namespace krait

#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// y[.., j, ..] = x[.., index[.., j, ..], ..] along `dim`. index is int64, of x's rank, and equal to x in every
/// other dimension (expanded views are fine: index_select is a gather with an expanded index).
/// An index out of range is an error on a CPU and a NaN on CUDA. fp32, fp64 or bf16.
Tensor gather_forward(const Tensor& x, int64_t dim, const Tensor& index);
/// dx (of the given shape) with dx[.., index[.., j, ..], ..] += dy[.., j, ..], summed in the order of j and in
/// fp32 (fp64 for fp64): deterministic.
Tensor gather_backward(const Tensor& dy, int64_t dim, const Tensor& index, const Shape& shape);

// x, dx (o, r, i) and y, dy (o, k, i) contiguous, index (o, k, i) with any strides; dx is zero, of accum_dtype(dy).
KRAIT_BACKENDS(void gather_forward(Tensor& y, const Tensor& x, const Tensor& index);
               void gather_backward(Tensor& dx, const Tensor& dy, const Tensor& index))

}  // namespace kernels
}  // namespace krait

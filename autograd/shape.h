#pragma once
#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

// Views where the tensor allows it; see core/tensor.h for the meaning of each.
Variable reshape(const Variable& x, const Shape& shape);  // one size may be -1
Variable transpose(const Variable& x, int64_t a, int64_t b);
Variable permute(const Variable& x, const std::vector<int64_t>& order);
Variable unsqueeze(const Variable& x, int64_t dim);
Variable squeeze(const Variable& x, int64_t dim);
Variable expand(const Variable& x, const Shape& shape);
/// x[.., begin:end, ..]
Variable slice(const Variable& x, int64_t dim, int64_t begin, int64_t end);
Variable select(const Variable& x, int64_t dim, int64_t index);
/// Pieces of the given sizes along dim. The gradients of all pieces are gathered in one tensor.
Vars split(const Variable& x, const std::vector<int64_t>& sizes, int64_t dim);
/// `parts` equal pieces.
Vars chunk(const Variable& x, int64_t parts, int64_t dim);

// Copies.
Variable contiguous(const Variable& x);
Variable concat(const Vars& parts, int64_t dim);
Variable stack(const Vars& parts, int64_t dim);  // along a new dimension
Variable flip(const Variable& x, int64_t dim);
/// To another floating dtype; the gradient comes back in x's.
Variable cast(const Variable& x, DType dtype);

/// y[.., j, ..] = x[.., index[j], ..] for a 1-D int64 index.
Variable index_select(const Variable& x, int64_t dim, const Tensor& index);
/// y[.., j, ..] = x[.., index[.., j, ..], ..]; see kernels/gather.h.
Variable gather(const Variable& x, int64_t dim, const Tensor& index);

}  // namespace autograd
}  // namespace krait

#pragma once
#include "autograd/variable.h"
#include "kernels/rope.h"

namespace krait {
inline namespace autograd {

using kernels::RopeStyle;

/// Rotary embedding of x (b, l, h, d) at positions (b, l) or (l), or at offset, offset + 1, ...; the last dimensions
/// beyond the tables' 2 cos.size(1) pass through. Slices of a fused projection need no copy. See kernels/rope.h.
Variable rope(const Variable& x, const Tensor& cos, const Tensor& sin, RopeStyle style, const Tensor& positions);
Variable rope(const Variable& x, const Tensor& cos, const Tensor& sin, RopeStyle style, int64_t offset = 0);

/// Rotates the first `heads` heads of x (b, l, h, d) and passes the others on, IN PLACE: the queries and keys of a
/// fused projection without a copy. The function that made x must not need its output in backward, and nobody else
/// may read x afterwards.
Variable rope_heads_(const Variable& x, int64_t heads, const Tensor& cos, const Tensor& sin, RopeStyle style,
                     const Tensor& positions, int64_t offset);

/// Queries, keys and values of one projection, (b, l, heads, d), the first `rotated` heads rotated: kernels/rope.h.
Variable linear_rope(const Variable& x, const Variable& w, const Variable& bias, int64_t heads, int64_t rotated,
                     const Tensor& cos, const Tensor& sin, RopeStyle style, int64_t offset);

}  // namespace autograd
}  // namespace krait

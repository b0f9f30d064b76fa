#pragma once
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// t itself where the elements of its last dimension lie side by side, else a contiguous copy.
inline Tensor last_contiguous(const Tensor& t) { return t.size(-1) == 1 || t.stride(-1) == 1 ? t : t.contiguous(); }

/// (..., c) as (r, c) with the elements of a row side by side; rows may stay apart.
inline Tensor dense_rows(const Tensor& t) { return last_contiguous(t.flatten_leading()); }

}  // namespace kernels
}  // namespace krait

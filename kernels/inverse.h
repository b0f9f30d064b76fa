#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// Inverses of a batch of fp64 matrices (b, n, n), by Gauss-Jordan elimination with partial pivoting. A singular matrix
/// gives infinities or NaN; nothing waits for the device.
Tensor batched_inverse(const Tensor& a);

// In place, contiguous; swaps (b, n) is int32 scratch.
KRAIT_BACKENDS(void batched_inverse(Tensor& a, Tensor& swaps))

}  // namespace kernels
}  // namespace krait

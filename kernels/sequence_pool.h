#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait::kernels {

/// One vector per sequence from its first lengths[b] positions:
///   mean: y[b,d] = 1/n sum_{t<n} x[b,t,d]        last: y[b,d] = x[b,n-1,d]        n = lengths[b]
enum class Pool : uint8_t { mean, last };

/// x (b, l, d) f32, f64 or bf16 -> y (b, d) like x; sums in fp32 (fp64 for fp64), in order of t.
/// lengths (b) int32 in [1, l], or undefined: all l. Positions from n on are not read and get no gradient.
Tensor sequence_pool_forward(const Tensor& x, const Tensor& lengths, Pool pool);
Tensor sequence_pool_backward(const Tensor& dy, const Tensor& lengths, int64_t length, Pool pool);

KRAIT_BACKENDS(void sequence_pool_forward(Tensor& y, const Tensor& x, const Tensor& lengths, Pool pool);
               void sequence_pool_backward(Tensor& dx, const Tensor& dy, const Tensor& lengths, Pool pool))

}  // namespace krait::kernels

#pragma once
#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

/// y = K * u + D u, causal along the length, and with K1 also from the right; see kernels/fft_conv.h.
/// u (b, l, h); K (h, lk); D (h) and K1 (h, lk1) or undefined; segments (b, l) int32 or undefined.
Variable fft_conv(const Variable& u, const Variable& K, const Variable& D = {}, const Variable& K1 = {},
                  const Tensor& segments = {});

}  // namespace autograd
}  // namespace krait

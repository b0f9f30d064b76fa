#pragma once
#include "autograd/variable.h"
#include "kernels/attention.h"

namespace krait {
inline namespace autograd {

using kernels::AttentionOptions;

/// Softmax attention (kernels/attention.h): q (b, lq, hq, d), k and v (b, lk, hkv, d) -> o (b, lq, hq, d).
/// Nothing of size lq x lk is kept: q, k, v, o and one number per row are.
Variable attention(const Variable& q, const Variable& k, const Variable& v, const AttentionOptions& options = {});

/// The same on one fused projection qkv (b, l, (hq + 2 hkv) d), in the order q, k, v; gives (b, l, hq d).
/// Neither slices nor gradients are copied: the backward fills one dqkv.
Variable attention_qkv(const Variable& qkv, int64_t hq, int64_t hkv, const AttentionOptions& options = {});

}  // namespace autograd
}  // namespace krait

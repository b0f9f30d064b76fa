#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// Joins what an attention gave over two disjoint sets of keys, (o, lse) and a part (kernels/attention.h):
///   lse' = log(e^lse + e^lse_part)      o' = e^(lse - lse') o + e^(lse_part - lse') o_part
/// in place. A row that saw no key (lse = -infinity) weighs nothing.
/// o (b, l, h, d), lse and lse_part (b, h, l): fp32 (fp64 where o_part is fp64); o_part like o, fp32, bf16 or fp64.
void attention_merge(Tensor& o, Tensor& lse, const Tensor& o_part, const Tensor& lse_part);

KRAIT_BACKENDS(void attention_merge(Tensor& o, Tensor& lse, const Tensor& o_part, const Tensor& lse_part))

}  // namespace kernels
}  // namespace krait

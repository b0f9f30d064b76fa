#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// dst += src, elementwise, in the wider of the two dtypes and rounded to dst's.
/// dst contiguous; equal shapes; fp32, fp64 or bf16 each (bf16 into fp32 is the usual gradient sum).
void accumulate(Tensor& dst, const Tensor& src);

KRAIT_BACKENDS(void accumulate(Tensor& dst, const Tensor& src))

}  // namespace kernels
}  // namespace krait

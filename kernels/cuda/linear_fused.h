#pragma once
#include "kernels/linear.h"

namespace krait::kernels::cuda {

// Products of bf16 matrices that are finished before they are written (linear_fused.cuh). Each says false, with nothing
// queued, where it does not serve: other GPUs than sm_90, few rows, widths that are no multiples of its tiles.

/// The product, plus bias where one is defined.
bool fused_product(const Gemm& product, const Tensor& bias);
/// y = gelu_tanh(pre), pre = product + bias. bias may be undefined.
bool fused_gelu(Tensor& y, Tensor& pre, const Gemm& product, const Tensor& bias);

/// y (b l, heads d) = product + bias, heads [0, rotated) of d = 64 rotated: as linear_rope of kernels/rope.h, halves.
bool fused_rope(Tensor& y, const Gemm& product, const Tensor& bias, int64_t length, int64_t rotated, const Tensor& cos,
                const Tensor& sin, int64_t offset);

/// db (or +=) the sums of partial (chunks, n) fp32 over its first dimension, in a fixed order. Of linear.cu.
void sum_chunks(Tensor& db, bool add, const Tensor& partial);

}  // namespace krait::kernels::cuda

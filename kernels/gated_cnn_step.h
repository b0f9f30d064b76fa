#pragma once
#include "core/gpu_backend.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// One position of the gated convolutional block (layers/gated_cnn.h) between its maps, for f inner and c convolved channels:
///   y = gelu(g) * [i, conv(m)]      [g, i, m] = projected, of widths f, f - c, c       gelu exact, conv causal with k taps
/// projected (b, 2 f), weight (c, k), bias (c): fp32, bf16 or fp64 alike. conv (b, k - 1, c) like them, the inputs before,
/// oldest first, contiguous, advances in place. y (b, f).
Tensor gated_cnn_step(Tensor& conv, const Tensor& projected, const Tensor& weight, const Tensor& bias);

// On a GPU: done says whether it has one kernel for it; else nothing was written, and the operations for sequences run.
// Everything is contiguous, nothing is empty.
KRAIT_GPU_BACKEND(void gated_cnn_step(bool& done, Tensor& y, Tensor& conv, const Tensor& projected, const Tensor& weight, const Tensor& bias))

}  // namespace kernels
}  // namespace krait

#pragma once
#include "core/gpu_backend.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// A linear map with a gated linear unit behind it (Dauphin et al. 2017), without gradients:
///   [a, g] = x w^T + bias, of n outputs each      y = a sigmoid(g)
/// x (r, k), w (2 n, k), bias (2 n) or undefined: fp32, bf16 or fp64 alike. y (r, n), [a, g] rounded to its dtype before.
Tensor glu_linear(const Tensor& x, const Tensor& w, const Tensor& bias);

// On a GPU: done says whether it has one kernel for it; else nothing was written, and a linear map and the unit run.
// Everything is contiguous, nothing is empty.
KRAIT_GPU_BACKEND(void glu_linear(bool& done, Tensor& y, const Tensor& x, const Tensor& w, const Tensor& bias))

}  // namespace kernels
}  // namespace krait

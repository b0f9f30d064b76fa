#pragma once
#include "core/gpu_backend.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// One position of linear attention (autograd/linear_attention.h) between its projections, for h heads of d channels:
///   S = e^g S + v (x) phi(k)      y = S phi(q)     with g = log sigmoid(W_g u + b_g) per head, or 0 without W_g
/// elu1: phi = elu + 1, S has one more row z, whose value is 1, and y is divided by z . phi(q) + eps. Else phi = 1 and q is
/// scaled by d^-1/2.
struct LinearAttentionStep {
  bool elu1 = true;
  double eps = 1e-6;
  Tensor u, gate_weight, gate_bias;  // (b, m), (h, m) like qkv, (h) in the dtype of sums; all or none
};
/// qkv (b, 3, h, d), contiguous: fp32, bf16 or fp64. S (b, h, d or d + 1, d) in the dtype of sums, contiguous, advances in
/// place. y (b, h, d) like qkv; undefined, with nothing written, where no kernel does all of it (on a CPU, for d > 1024).
Tensor linear_attention_step(Tensor& S, const Tensor& qkv, const LinearAttentionStep& step);

// On a GPU: done as above. Everything is contiguous, nothing is empty.
KRAIT_GPU_BACKEND(void linear_attention_step(bool& done, Tensor& y, Tensor& S, const Tensor& qkv, const LinearAttentionStep& step))

}  // namespace kernels
}  // namespace krait

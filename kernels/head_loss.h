#pragma once
#include "core/gpu_backend.h"
#include "kernels/cross_entropy.h"

namespace krait {
namespace kernels {

// The head's cross entropy with its exponentials made inside the product of x and w, so that the logits exist nowhere and
// their gradient's matrix is read by products alone. With a reference r_i = x_i . w_{y_i} (fp32):
//   e_ij = exp(x_i . w_j - r_i), from the product's fp32 sums; stored as bf16, which has fp32's range
//   S_i = sum_j e_ij          nll_i = log(S_i / e_{i,y_i})          lse_i = r_i + log S_i
// and with a_i = 1 + 2 z lse_i, s_i = scale / max(count, 1) a_i / S_i and f = e but for f_{i,y_i} = e_{i,y_i} - S_i / a_i,
// the gradient of logit ij is s_i f_ij, whose factor leaves the products:
//   dx_i = s_i (f w)_i          dw += f^T (s x)
// A row whose S_i passes 2^80 (a logit some 55 above the target's) is made again with its largest logit as r_i.

// done: whether it was done. It is not for CPUs (a chunk's logits lie in their caches), other dtypes than bf16, GPUs before
// and after sm_90, a d that is no multiple of 8, a v that is none of 32, label smoothing and a cap. losses and nll (t), dx (t, d),
// dw (v, d) fp32, added to; dx and dw may be undefined. targets (t) are contiguous, valid and chunk (rows) are resolved.
KRAIT_GPU_BACKEND(void head_loss(bool& done, Tensor& losses, Tensor& nll, Tensor& dx, Tensor& dw, const Tensor& x,
                                 const Tensor& w, const Tensor& targets, const Tensor& count, int64_t valid, int64_t chunk,
                                 double scale, const CrossEntropyOptions& options))

}  // namespace kernels
}  // namespace krait

#pragma once
#include "autograd/variable.h"
#include "kernels/cross_entropy.h"

namespace krait {
inline namespace autograd {

using kernels::CrossEntropyOptions;

/// Mean cross entropy over the kept targets, a scalar (fp32; fp64 for fp64): logits (..., v), targets (...).
/// kernels/cross_entropy.h has the mathematics. count, when given, divides instead of the number of kept targets.
Variable cross_entropy(const Variable& logits, const Tensor& targets, const CrossEntropyOptions& options = {},
                       const Tensor& count = {});

struct LossOut {
  Variable loss;   // loss_scale times the mean
  Tensor nll_sum;  // scalar: sum of -log p(target) over kept targets, without smoothing, z-loss and scale
  Tensor count;    // fp32 scalar: kept targets, or the count that was given
};

/// Cross entropy of the language-model head x w^T: x (..., d), w (v, d), targets (...), in chunks of rows
/// (0: chosen), so that the logits never exist whole. When recording, the gradients are made here, in the forward.
/// When w accumulates in place, its gradient is added to its buffer here too: clear buffers before the forward, and
/// call backward with the gradient 1 for this loss (an error on a CPU otherwise, NaN in dx on CUDA); a factor known up
/// front, such as 1 / accumulation steps, goes into loss_scale. Otherwise any upstream gradient is right.
/// With a shard, w is a member's rows of the whole matrix; x is replicated, and dx is this member's part of it: wrap x
/// in copy_to_group.
LossOut linear_cross_entropy(const Variable& x, const Variable& w, const Tensor& targets,
                             const CrossEntropyOptions& options = {}, double loss_scale = 1.0, int64_t chunk_rows = 0,
                             const Tensor& count = {}, const kernels::VocabularyShard& shard = {});

}  // namespace autograd
}  // namespace krait

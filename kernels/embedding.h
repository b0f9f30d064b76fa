#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// Rows of a table: y[..., :] = table[tokens[...], :].
/// table (v, d): fp32, bf16 or fp64; tokens (...): int32 or int64 on the same device; y (..., d) like table.
/// A token outside [0, v): an error on a CPU that names position and value; on a GPU, which nobody waits for, its
/// row of y is NaN and its gradient is dropped.
Tensor embedding_forward(const Tensor& table, const Tensor& tokens);

/// dtable[t, :] += sum of dy[i, :] over the positions i with tokens[i] = t, in order of position, summed in fp32
/// (fp64 for fp64): equal inputs give equal bits. dtable (v, d) contiguous, of dy's dtype, or fp32 under bf16 dy.
/// On a GPU at most 2^31 - 1 tokens.
void embedding_backward(Tensor& dtable, const Tensor& dy, const Tensor& tokens);

// Backends: everything contiguous; y and dy (n, d), tokens (n).
KRAIT_BACKENDS(void embedding_forward(Tensor& y, const Tensor& table, const Tensor& tokens);
               void embedding_backward(Tensor& dtable, const Tensor& dy, const Tensor& tokens))

}  // namespace kernels
}  // namespace krait

#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// Rows of a table: y[..., :] = table[tokens[...], :].
/// table (v, d): fp32, bf16 or fp64; tokens (...): int32 or int64 on the same device; y (..., d) like table.
/// A token outside [0, v): an error on a CPU that names position and value; on a GPU, which nobody waits for, its
/// row of y is NaN and its gradient is dropped.
/// With rows.whole, the table is rows [first, first + v) of a whole one whose other rows are elsewhere: their tokens
/// give 0 and no gradient.
struct TableRows {
  int64_t first = 0, whole = 0;  // 0: the table is whole
};
Tensor embedding_forward(const Tensor& table, const Tensor& tokens, TableRows rows = {});

/// dtable[t, :] += sum of dy[i, :] over the positions i with tokens[i] = t, in order of position, summed in fp32
/// (fp64 for fp64): equal inputs give equal bits. dtable (v, d) contiguous, of dy's dtype, or fp32 under bf16 dy.
/// On a GPU at most 2^31 - 1 tokens.
void embedding_backward(Tensor& dtable, const Tensor& dy, const Tensor& tokens, TableRows rows = {});

// Backends: everything contiguous; y and dy (n, d), tokens (n); rows.whole is set.
KRAIT_BACKENDS(void embedding_forward(Tensor& y, const Tensor& table, const Tensor& tokens, TableRows rows);
               void embedding_backward(Tensor& dtable, const Tensor& dy, const Tensor& tokens, TableRows rows))

}  // namespace kernels
}  // namespace krait

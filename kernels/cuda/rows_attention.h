#pragma once
#include "kernels/cuda/few_attention.h"

namespace krait::kernels::cuda {

/// attention_append of many rows, as in few_attention.h: a block, or the blocks of a cluster, for a row and up to four
/// query heads of one key head. Which block sums which positions follows the position alone: neither the capacity nor the
/// other rows change a row's outputs. splits, early: not asked for. When the next kernel begins, all in front of this one
/// have finished.
void rows_attention(StepAttention a, Stream stream);

}  // namespace krait::kernels::cuda

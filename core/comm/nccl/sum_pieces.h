#pragma once
#include <cuda_runtime.h>

#include "core/tensor.h"

namespace krait::comm {

/// to[i] = the sum over r < members of pieces[r n + i], in that order, in fp32 (fp64 for fp64). f32, bf16 or f64; n a multiple
/// of 16 bytes, both aligned to 16 bytes.
void sum_pieces(void* to, const void* pieces, int64_t n, int members, DType dtype, cudaStream_t stream);

}  // namespace krait::comm

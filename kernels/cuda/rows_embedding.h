#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/stream.h"

namespace krait::kernels::cuda {

/// step_embedding (kernels/step_embedding.h) of bf16 and, for the norm behind it, weighted (rows, d) = y weight and
/// squares (rows, 1) of y (RowScale).
struct RowsEmbedding {
  bf16* y;
  const bf16* table;
  const int64_t* tokens;
  const bf16* places;  // may be null, like positions
  const int32_t* positions;
  int64_t v, p;  // rows of table and places
  int rows, d;   // d a multiple of 8
  const float* weight;  // null: no norm
  bf16* weighted;
  float* squares;
};

void rows_embedding(const RowsEmbedding& a, Stream stream);

}  // namespace krait::kernels::cuda

#pragma once
#include <cstdint>

#include "core/device.h"

namespace krait::kernels {

/// How many of t rows of logits, of row_bytes each, linear_cross_entropy (kernels/cross_entropy.h) makes at a time unless
/// told: it holds a buffer of so many.
int64_t logit_chunk_rows(int64_t t, int64_t row_bytes, Device device);

}  // namespace krait::kernels

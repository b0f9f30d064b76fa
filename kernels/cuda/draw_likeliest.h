#pragma once
#include <cstdint>

#include "core/stream.h"

namespace krait::kernels::cuda {

/// The most likely tokens of 1 to 64 rows, from the keys (likeliest.cuh) that a head left of parts of its columns, and
/// sample_advance (kernels/sample.h).
struct LikeliestDraw {
  const uint64_t* likeliest;  // (rows, parts)
  int64_t *made, *last, *step;
  int32_t* position;
  int rows;
  int64_t room;
  int parts;
};

void draw_likeliest(const LikeliestDraw& a, Stream stream);

}  // namespace krait::kernels::cuda

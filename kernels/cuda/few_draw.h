#pragma once
#include <cstdint>

#include "core/stream.h"
#include "core/tensor.h"
#include "kernels/cuda/few_map.h"

namespace krait::kernels::cuda {

/// Whether y (rows, n), rows y_row apart, are these logits, or more columns than they have.
bool are_logits_of(const bf16* y, int64_t rows, int64_t n, int64_t y_row, const Tensor& logits);
/// Whether the map makes these logits, or more columns than they have, and tells their likeliest.
bool draws_from(const FewMap& map, const Tensor& logits);
/// sample_next of temperature 0: such a map, which has not been launched, and draw_likeliest behind it.
void few_map_draw(FewMap map, bool early, Tensor& made, Tensor& last, Tensor& position, Tensor& step, const Tensor& logits, Stream stream);

}  // namespace krait::kernels::cuda

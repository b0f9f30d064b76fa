#include "kernels/cuda/few_draw.h"

#include "kernels/cuda/draw_likeliest.h"

namespace krait::kernels::cuda {

bool are_logits_of(const bf16* y, int64_t rows, int64_t n, int64_t y_row, const Tensor& logits) {
  return logits.dtype() == DType::bf16 && logits.raw_data() == y && logits.size(0) == rows && logits.size(1) <= n && (rows == 1 || logits.stride(0) == y_row);
}

bool draws_from(const FewMap& map, const Tensor& logits) {
  return map.units == nullptr && map.total == nullptr && are_logits_of(map.y, map.rows, map.n, map.y_row, logits) && few_map_choosing_blocks(map) > 0;
}

void few_map_draw(FewMap map, bool early, Tensor& made, Tensor& last, Tensor& position, Tensor& step, const Tensor& logits, Stream stream) {
  const int64_t parts = few_map_choosing_blocks(map);
  const Tensor likeliest = empty({map.rows, parts}, DType::i64, logits.device());
  map.likeliest = reinterpret_cast<uint64_t*>(likeliest.data<int64_t>());
  map.choices = static_cast<int>(logits.size(1));
  few_map(map, early, stream);
  draw_likeliest({map.likeliest, made.data<int64_t>(), last.data<int64_t>(), step.data<int64_t>(), position.data<int32_t>(), map.rows, made.size(1),
                  static_cast<int>(parts)},
                 stream);
}

}  // namespace krait::kernels::cuda

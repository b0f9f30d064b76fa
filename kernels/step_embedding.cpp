#include "kernels/step_embedding.h"

namespace krait::kernels {

Tensor step_embedding(const Tensor& table, const Tensor& tokens, const Tensor& places, const Tensor& positions) {
  KRAIT_CHECK(table.ndim() == 2 && tokens.dtype() == DType::i64 && tokens.device() == table.device(),
              "step_embedding: table {}, tokens {}; expected (v, d) and int64", describe(table), describe(tokens));
  KRAIT_CHECK(places.defined() == positions.defined(), "step_embedding: positions and their table come together");
  if (places.defined())
    KRAIT_CHECK(places.ndim() == 2 && places.size(1) == table.size(1) && places.dtype() == table.dtype() && places.device() == table.device() &&
                    positions.dtype() == DType::i32 && positions.numel() == tokens.numel() && positions.device() == table.device(),
                "step_embedding: places {}, positions {} for a table {} and tokens {}", describe(places), describe(positions),
                describe(table), tokens.shape());
  Tensor y = empty({tokens.numel(), table.size(1)}, table.dtype(), table.device());
  if (y.numel() > 0)
    KRAIT_DISPATCH(table.device(), step_embedding(y, table.contiguous(), tokens.contiguous(), places.defined() ? places.contiguous() : places,
                                                  positions.defined() ? positions.contiguous() : positions));
  return y.view(tokens.shape().append(table.size(1)));
}

}  // namespace krait::kernels

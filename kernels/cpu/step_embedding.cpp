#include "kernels/step_embedding.h"

#include "kernels/cpu/put.h"
#include "kernels/embedding.h"

namespace krait::kernels::cpu {

void step_embedding(Tensor& y, const Tensor& table, const Tensor& tokens, const Tensor& places, const Tensor& positions) {
  embedding_forward(y, table, tokens.view({tokens.numel()}), {0, table.size(0)});
  if (!places.defined()) return;
  Tensor other = empty(y.shape(), y.dtype(), y.device());
  embedding_forward(other, places, positions.view({positions.numel()}), {0, places.size(0)});
  visit_float(y.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    T* const to = y.data<T>();
    const T* const from = other.data<T>();
    for (int64_t i = 0; i < y.numel(); ++i) put(to[i], static_cast<A>(to[i]) + static_cast<A>(from[i]));
  });
}

}  // namespace krait::kernels::cpu

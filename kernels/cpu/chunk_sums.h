#pragma once
#include "core/parallel.h"
#include "core/tensor.h"

namespace krait::kernels::cpu {

/// total = or += what the chunks have, one after the other; theirs lie `stride` apart.
template <class A>
void add_in_order(Tensor& total, bool add, const A* partial, int64_t chunks, int64_t stride) {
  A* to = total.data<A>();
  parallel_for(0, total.numel(), 4096, [&](int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j) {
      A sum = add ? to[j] : A(0);
      for (int64_t q = 0; q < chunks; ++q) sum += partial[q * stride + j];
      to[j] = sum;
    }
  });
}

}  // namespace krait::kernels::cpu

#include "kernels/attention_merge.h"

#include <cmath>
#include <limits>

#include "core/parallel.h"

namespace krait::kernels::cpu {

void attention_merge(Tensor& o_, Tensor& lse_, const Tensor& o_part, const Tensor& lse_part) {
  const int64_t l = o_.size(1), h = o_.size(2), d = o_.size(3);
  visit_float(o_part.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    constexpr A kNone = -std::numeric_limits<A>::infinity();
    A* const o0 = o_.data<A>();
    A* const lse = lse_.data<A>();
    const T* const p0 = o_part.data<T>();
    const A* const other = lse_part.data<A>();
    parallel_for(0, o_.size(0) * l * h, std::max<int64_t>(1, 8192 / (d + 16)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {  // (b, l, h)
        const int64_t at = (row / (l * h) * h + row % h) * l + row / h % l;
        const A top = std::max(lse[at], other[at]);
        if (top == kNone) continue;
        const A x = std::exp(lse[at] - top), y = std::exp(other[at] - top), sum = x + y;
        const A keep = x / sum, add = y / sum;
        A* const o = o0 + row * d;
        const T* const p = p0 + row * d;
#pragma omp simd
        for (int64_t c = 0; c < d; ++c) o[c] = keep * o[c] + add * static_cast<A>(p[c]);
        lse[at] = top + std::log(sum);
      }
    });
  });
}

}  // namespace krait::kernels::cpu

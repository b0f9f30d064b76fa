#include "kernels/accumulate.h"

#include "core/parallel.h"

namespace krait::kernels::cpu {

void accumulate(Tensor& dst, const Tensor& src) {
  visit_float(dst.dtype(), [&]<class D>() {
    visit_float(src.dtype(), [&]<class S>() {
      using A = std::conditional_t<std::is_same_v<D, double> || std::is_same_v<S, double>, double, float>;
      D* d = dst.data<D>();
      const S* s = src.data<S>();
      parallel_for(0, dst.numel(), 16384, [&](int64_t first, int64_t last) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i)
          d[i] = static_cast<D>(static_cast<A>(d[i]) + static_cast<A>(s[i]));
      });
    });
  });
}

}  // namespace krait::kernels::cpu

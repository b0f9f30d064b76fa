#include "kernels/sequence_pool.h"

#include <vector>

#include "core/parallel.h"

namespace krait::kernels::cpu {

namespace {

int64_t length_of(const Tensor& lengths, int64_t row, int64_t l) {
  return lengths.defined() ? std::clamp<int64_t>(lengths.data<int32_t>()[row], 1, l) : l;
}

}  // namespace

void sequence_pool_forward(Tensor& y, const Tensor& x, const Tensor& lengths, Pool pool) {
  const int64_t b = x.size(0), l = x.size(1), d = x.size(2);
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    parallel_for(0, b, 1, [&](int64_t first, int64_t last) {
      std::vector<A> sum(static_cast<size_t>(d));
      for (int64_t row = first; row < last; ++row) {
        const int64_t n = length_of(lengths, row, l);
        const T* in = x.data<T>() + row * l * d;
        T* out = y.data<T>() + row * d;
        if (pool == Pool::last) {
          std::copy_n(in + (n - 1) * d, d, out);
          continue;
        }
        std::fill(sum.begin(), sum.end(), A(0));
        for (int64_t t = 0; t < n; ++t) {
#pragma omp simd
          for (int64_t c = 0; c < d; ++c) sum[static_cast<size_t>(c)] += static_cast<A>(in[t * d + c]);
        }
        for (int64_t c = 0; c < d; ++c) out[c] = static_cast<T>(sum[static_cast<size_t>(c)] / static_cast<A>(n));
      }
    });
  });
}

void sequence_pool_backward(Tensor& dx, const Tensor& dy, const Tensor& lengths, Pool pool) {
  const int64_t b = dx.size(0), l = dx.size(1), d = dx.size(2);
  visit_float(dx.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    parallel_for(0, b * l, 64, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t row = i / l, t = i % l, n = length_of(lengths, row, l);
        const A share = pool == Pool::mean ? (t < n ? A(1) / static_cast<A>(n) : A(0)) : A(t == n - 1 ? 1 : 0);
        const T* in = dy.data<T>() + row * d;
        T* out = dx.data<T>() + i * d;
        for (int64_t c = 0; c < d; ++c) out[c] = static_cast<T>(share * static_cast<A>(in[c]));
      }
    });
  });
}

}  // namespace krait::kernels::cpu

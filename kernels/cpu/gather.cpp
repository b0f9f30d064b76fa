#include "kernels/gather.h"

#include <algorithm>

#include "core/parallel.h"

namespace krait::kernels::cpu {

namespace {

struct Index {
  const int64_t* data;
  int64_t so, sk, si, limit;
  explicit Index(const Tensor& t, int64_t rows)
      : data(t.data<int64_t>()), so(t.stride(0)), sk(t.stride(1)), si(t.stride(2)), limit(rows) {}
  int64_t at(int64_t o, int64_t k, int64_t i) const {
    const int64_t value = data[o * so + k * sk + i * si];
    KRAIT_CHECK(value >= 0 && value < limit, "gather: index {} is out of range for {} rows", value, limit);
    return value;
  }
};

}  // namespace

void gather_forward(Tensor& y, const Tensor& x, const Tensor& index) {
  const int64_t r = x.size(1), n = x.size(2), k_size = y.size(1);
  const Index at(index, r);
  visit_float(x.dtype(), [&]<class T>() {
    T* const out = y.data<T>();
    const T* const in = x.data<T>();
    parallel_for(0, y.size(0) * k_size, std::max<int64_t>(1, 8192 / n), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const int64_t o = row / k_size, k = row % k_size;
        if (at.si == 0)
          std::copy_n(in + (o * r + at.at(o, k, 0)) * n, n, out + row * n);
        else
          for (int64_t i = 0; i < n; ++i) out[row * n + i] = in[(o * r + at.at(o, k, i)) * n + i];
      }
    });
  });
}

// A thread owns strips of (o, i) lines, so that no two add to one place.
void gather_backward(Tensor& dx, const Tensor& dy, const Tensor& index) {
  const int64_t r = dx.size(1), n = dx.size(2), k_size = dy.size(1);
  const int64_t width = 256, strips = (n + width - 1) / width;
  const Index at(index, r);
  visit_float(dy.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    A* const out = dx.data<A>();
    const T* const in = dy.data<T>();
    parallel_for(0, dx.size(0) * strips, std::max<int64_t>(1, 8192 / (k_size * std::min(n, width))),
                 [&](int64_t first, int64_t last) {
                   for (int64_t t = first; t < last; ++t) {
                     const int64_t o = t / strips, i0 = t % strips * width, i1 = std::min(i0 + width, n);
                     for (int64_t k = 0; k < k_size; ++k)
                       for (int64_t i = i0; i < i1; ++i)
                         out[(o * r + at.at(o, k, i)) * n + i] += static_cast<A>(in[(o * k_size + k) * n + i]);
                   }
                 });
  });
}

}  // namespace krait::kernels::cpu

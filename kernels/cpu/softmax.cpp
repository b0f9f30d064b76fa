#include "kernels/softmax.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "core/parallel.h"
#include "kernels/cpu/put.h"
#include "kernels/cpu/vector_math.h"

namespace krait::kernels::cpu {

namespace {

// Calls row(index) for every row, in parallel.
template <class F>
void for_rows(int64_t r, int64_t c, F row) {
  parallel_for(0, r, std::max<int64_t>(1, 8192 / c), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) row(i);
  });
}

template <class T>
accum_t<T> row_max(const T* x, int64_t c) {
  using A = accum_t<T>;
  A m = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : m)
  for (int64_t k = 0; k < c; ++k) m = std::max(m, static_cast<A>(x[k]));
  return m;
}

// row(y, x, c, the largest of x, the sum of e^{x - largest}) for every row.
template <class F>
void softmax_rows(Tensor& y_out, const Tensor& x_in, F row) {
  const int64_t r = x_in.size(0), c = x_in.size(1);
  visit_float(x_in.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    for_rows(r, c, [&, y0 = y_out.data<T>(), x0 = x_in.data<T>()](int64_t i) {
      const T* const x = x0 + i * c;
      const A m = row_max(x, c);
      A s = 0;
#pragma omp simd reduction(+ : s)
      for (int64_t k = 0; k < c; ++k) s += vexp(static_cast<A>(x[k]) - m);
      row(y0 + i * c, x, c, m, s);
    });
  });
}

}  // namespace

void softmax_forward(Tensor& y_out, const Tensor& x_in) {
  softmax_rows(y_out, x_in, []<class T, class A>(T* y, const T* x, int64_t c, A m, A s) {
    const A scale = A(1) / s;
    // exp again instead of a stored fp32 row: bf16 results are rounded once, and no scratch is needed.
#pragma omp simd
    for (int64_t k = 0; k < c; ++k) put(y[k], vexp(static_cast<A>(x[k]) - m) * scale);
  });
}

void softmax_backward(Tensor& dx_out, const Tensor& dy_in, const Tensor& y_in) {
  const int64_t r = y_in.size(0), c = y_in.size(1);
  visit_float(y_in.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    for_rows(r, c, [&, dx0 = dx_out.data<T>(), dy0 = dy_in.data<T>(), y0 = y_in.data<T>()](int64_t i) {
      const T *const dy = dy0 + i * c, *const y = y0 + i * c;
      T* const dx = dx0 + i * c;
      A dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t k = 0; k < c; ++k) dot += static_cast<A>(dy[k]) * static_cast<A>(y[k]);
#pragma omp simd
      for (int64_t k = 0; k < c; ++k) put(dx[k], static_cast<A>(y[k]) * (static_cast<A>(dy[k]) - dot));
    });
  });
}

void log_softmax_forward(Tensor& y_out, const Tensor& x_in) {
  softmax_rows(y_out, x_in, []<class T, class A>(T* y, const T* x, int64_t c, A m, A s) {
    const A log_s = vlog(s);
#pragma omp simd
    for (int64_t k = 0; k < c; ++k) put(y[k], static_cast<A>(x[k]) - m - log_s);
  });
}

void log_softmax_backward(Tensor& dx_out, const Tensor& dy_in, const Tensor& y_in) {
  const int64_t r = y_in.size(0), c = y_in.size(1);
  visit_float(y_in.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    for_rows(r, c, [&, dx0 = dx_out.data<T>(), dy0 = dy_in.data<T>(), y0 = y_in.data<T>()](int64_t i) {
      const T *const dy = dy0 + i * c, *const y = y0 + i * c;
      T* const dx = dx0 + i * c;
      A total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t k = 0; k < c; ++k) total += static_cast<A>(dy[k]);
#pragma omp simd
      for (int64_t k = 0; k < c; ++k)
        put(dx[k], static_cast<A>(dy[k]) - vexp(static_cast<A>(y[k])) * total);
    });
  });
}

}  // namespace krait::kernels::cpu

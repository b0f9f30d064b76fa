#include "kernels/gated_rms_norm.h"

#include "kernels/cpu/gated_row.h"

namespace krait::kernels::cpu {

namespace {

template <class A>
void multiply_row(A* __restrict v, const A* __restrict by, int64_t e) {
#pragma omp simd
  for (int64_t j = 0; j < e; ++j) v[j] *= by[j];
}

template <class T, class A>
void write_row(T* __restrict y, const A* __restrict v, const A* __restrict w, const A* __restrict s, A rstd, int64_t c) {
  if (s != nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) put(y[j], v[j] * rstd * w[j] * s[j]);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) put(y[j], v[j] * rstd * w[j]);
  }
}

// One group of one row; adds its part to dw.
template <bool kNormFirst, class T, class A>
void backward_group(T* __restrict dx, T* __restrict dz, A* __restrict dw, const T* __restrict dy,
                    const T* __restrict x, const A* __restrict s, const A* __restrict slope, const A* __restrict w,
                    A rstd, int64_t c) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < c; ++j) {
    const A up = static_cast<A>(dy[j]), v = static_cast<A>(x[j]);
    const A t = kNormFirst ? up * s[j] : up, vhat = (kNormFirst ? v : v * s[j]) * rstd;
    sum += t * w[j] * vhat;
  }
  write_gradient<kNormFirst>(dx, dz, dw, dy, x, s, slope, w, rstd, sum / static_cast<A>(c), c);
}

}  // namespace

void gated_rms_norm_forward(Tensor& y_out, Tensor& rstd_out, const Tensor& x_in, const Tensor& z_in,
                            const Tensor& w_in, double eps, bool norm_first) {
  const int64_t r = x_in.size(0), e = x_in.size(1), groups = rstd_out.size(1), c = e / groups, z_row = z_in.stride(0);
  visit_float(x_in.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    T* y = y_out.data<T>();
    A* rstd = rstd_out.data<A>();
    const T *x = x_in.data<T>(), *z = z_in.data<T>();
    const A* w = w_in.data<A>();
    parallel_for(0, r, std::max<int64_t>(1, kNormGrain / e), [&](int64_t first, int64_t last) {
      const std::unique_ptr<A[]> row(new A[static_cast<size_t>(2 * e)]);
      A *v = row.get(), *s = v + e;
      for (int64_t i = first; i < last; ++i) {
        load_row(v, x + i * e, e);
        gate_row(s, z + i * z_row, e);
        if (!norm_first) multiply_row(v, s, e);
        for (int64_t g = 0; g < groups; ++g) {
          const A scale = row_statistics<false>(v + g * c, c, static_cast<A>(eps)).rstd;
          rstd[i * groups + g] = scale;
          write_row(y + i * e + g * c, v + g * c, w + g * c, norm_first ? s + g * c : nullptr, scale, c);
        }
      }
    });
  });
}

void gated_rms_norm_backward(Tensor& dx, Tensor& dz, Tensor& y, Tensor& dw, bool add_dw, const Tensor& dy, const Tensor& x, const Tensor& z,
                             const Tensor& w, const Tensor& rstd, bool norm_first) {
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const auto group = norm_first ? backward_group<true, T, A> : backward_group<false, T, A>;
    backward_rows<T>(dx, dz, y, dw, add_dw, dy, x, z, w, rstd, [=](int64_t, int64_t c, A scale, auto*... rows) { group(rows..., scale, c); });
  });
}

}  // namespace krait::kernels::cpu

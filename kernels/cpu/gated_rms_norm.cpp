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

// Rows are cut into chunks by the shape alone, so that dw does not depend on the number of threads.
void gated_rms_norm_backward(Tensor& dx_out, Tensor& dz_out, Tensor& y_out, Tensor& dw_out, bool add_dw,
                             const Tensor& dy_in, const Tensor& x_in, const Tensor& z_in, const Tensor& w_in, const Tensor& rstd_in,
                             bool norm_first) {
  const int64_t r = x_in.size(0), e = x_in.size(1), groups = rstd_in.size(1), c = e / groups, z_row = z_in.stride(0);
  const int64_t dz_row = dz_out.stride(0);
  const int64_t chunk = std::max<int64_t>(16, (r + 127) / 128), chunks = (r + chunk - 1) / chunk;
  visit_float(x_in.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Tensor partial = zeros({chunks, e}, dtype_of<A>, kCpu);
    A* partial_w = partial.data<A>();
    T *dx = dx_out.data<T>(), *dz = dz_out.data<T>(), *y = y_out.defined() ? y_out.data<T>() : nullptr;
    const T *dy = dy_in.data<T>(), *x = x_in.data<T>(), *z = z_in.data<T>();
    const A *w = w_in.data<A>(), *rstd = rstd_in.data<A>();
    parallel_for(0, chunks, std::max<int64_t>(1, kNormGrain / (e * chunk)), [&](int64_t first, int64_t last) {
      const std::unique_ptr<A[]> row(new A[static_cast<size_t>(2 * e)]);
      A *s = row.get(), *slope = s + e;
      for (int64_t k = first; k < last; ++k) {
        A* dw = partial_w + k * e;
        for (int64_t i = k * chunk; i < std::min(r, (k + 1) * chunk); ++i) {
          gate_rows(s, slope, z + i * z_row, e);
          for (int64_t g = 0; g < groups; ++g) {
            const int64_t at = i * e + g * c, col = g * c;
            const auto group = norm_first ? backward_group<true, T, A> : backward_group<false, T, A>;
            const A scale = rstd[i * groups + g];
            group(dx + at, dz + i * dz_row + col, dw + col, dy + at, x + at, s + col, slope + col, w + col, scale, c);
            if (y != nullptr) write_again(y + at, x + at, s + col, w + col, scale, c);
          }
        }
      }
    });
    sum_chunks(dw_out.data<A>(), add_dw, partial_w, chunks, e);
  });
}

}  // namespace krait::kernels::cpu

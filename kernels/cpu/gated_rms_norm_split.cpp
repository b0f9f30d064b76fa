#include "kernels/gated_rms_norm_split.h"

#include "kernels/cpu/gated_row.h"

namespace krait::kernels::cpu {

namespace {

template <class T, class A>
A square_sum(const T* __restrict x, const A* __restrict s, bool gated, int64_t c) {
  A sum = 0;
  if (gated) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < c; ++j) {
      const A v = static_cast<A>(x[j]) * s[j];
      sum += v * v;
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < c; ++j) sum += static_cast<A>(x[j]) * static_cast<A>(x[j]);
  }
  return sum;
}

template <class T, class A>
A dot_group(const T* __restrict dy, const T* __restrict x, const A* __restrict s, const A* __restrict w, A rstd, int64_t c) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < c; ++j) sum += static_cast<A>(dy[j]) * static_cast<A>(x[j]) * s[j] * rstd * w[j];
  return sum;
}

// f(s, row) for every row, with silu(z) of the row.
template <class T, class F>
void for_each_row(const Tensor& x, const Tensor& z_in, F f) {
  using A = accum_t<T>;
  const int64_t r = x.size(0), e = x.size(1), z_row = z_in.stride(0);
  const T* z = z_in.data<T>();
  parallel_for(0, r, std::max<int64_t>(1, kNormGrain / e), [&](int64_t first, int64_t last) {
    const std::unique_ptr<A[]> s(new A[static_cast<size_t>(e)]);
    for (int64_t i = first; i < last; ++i) {
      gate_row(s.get(), z + i * z_row, e);
      f(s.get(), i);
    }
  });
}

}  // namespace

void gated_rms_norm_squares(Tensor& squares, const Tensor& x, const Tensor& z, bool norm_first) {
  const int64_t e = x.size(1), groups = squares.size(1), c = e / groups;
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    for_each_row<T>(x, z, [&](const A* s, int64_t i) {
      for (int64_t g = 0; g < groups; ++g)
        squares.data<A>()[i * groups + g] = square_sum(x.data<T>() + i * e + g * c, s + g * c, !norm_first, c);
    });
  });
}

void gated_rms_norm_apply(Tensor& y, const Tensor& x, const Tensor& z, const Tensor& w, const Tensor& rstd) {
  const int64_t e = x.size(1), groups = rstd.size(1), c = e / groups;
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    for_each_row<T>(x, z, [&](const A* s, int64_t i) {
      for (int64_t g = 0, at = i * e; g < groups; ++g, at += c)
        write_again(y.data<T>() + at, x.data<T>() + at, s + g * c, w.data<A>() + g * c, rstd.data<A>()[i * groups + g], c);
    });
  });
}

void gated_rms_norm_dots(Tensor& dots, const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& w,
                         const Tensor& rstd) {
  const int64_t e = x.size(1), groups = rstd.size(1), c = e / groups;
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    for_each_row<T>(x, z, [&](const A* s, int64_t i) {
      for (int64_t g = 0, at = i * e; g < groups; ++g, at += c)
        dots.data<A>()[i * groups + g] = dot_group(dy.data<T>() + at, x.data<T>() + at, s + g * c, w.data<A>() + g * c,
                                                   rstd.data<A>()[i * groups + g], c);
    });
  });
}

// Rows are cut into chunks by the shape alone, so that dw does not depend on the number of threads.
void gated_rms_norm_backward_split(Tensor& dx_out, Tensor& dz_out, Tensor& y_out, Tensor& dw_out, bool add_dw,
                                   const Tensor& dy_in, const Tensor& x_in, const Tensor& z_in, const Tensor& w_in,
                                   const Tensor& rstd_in, const Tensor& mean_in, bool norm_first) {
  const int64_t r = x_in.size(0), e = x_in.size(1), groups = rstd_in.size(1), c = e / groups;
  const int64_t z_row = z_in.stride(0), dz_row = dz_out.stride(0);
  const int64_t chunk = std::max<int64_t>(16, (r + 127) / 128), chunks = (r + chunk - 1) / chunk;
  visit_float(x_in.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Tensor partial = zeros({chunks, e}, dtype_of<A>, kCpu);
    A* partial_w = partial.data<A>();
    T *dx = dx_out.data<T>(), *dz = dz_out.data<T>(), *y = y_out.defined() ? y_out.data<T>() : nullptr;
    const T *dy = dy_in.data<T>(), *x = x_in.data<T>(), *z = z_in.data<T>();
    const A *w = w_in.data<A>(), *rstd = rstd_in.data<A>(), *mean = mean_in.data<A>();
    const auto group = norm_first ? write_gradient<true, T, A> : write_gradient<false, T, A>;
    parallel_for(0, chunks, std::max<int64_t>(1, kNormGrain / (e * chunk)), [&](int64_t first, int64_t last) {
      const std::unique_ptr<A[]> row(new A[static_cast<size_t>(2 * e)]);
      A *s = row.get(), *slope = s + e;
      for (int64_t k = first; k < last; ++k)
        for (int64_t i = k * chunk; i < std::min(r, (k + 1) * chunk); ++i) {
          gate_rows(s, slope, z + i * z_row, e);
          for (int64_t g = 0; g < groups; ++g) {
            const int64_t at = i * e + g * c, col = g * c;
            const A scale = rstd[i * groups + g];
            group(dx + at, dz + i * dz_row + col, partial_w + k * e + col, dy + at, x + at, s + col, slope + col, w + col,
                  scale, mean[i * groups + g], c);
            if (y != nullptr) write_again(y + at, x + at, s + col, w + col, scale, c);
          }
        }
    });
    sum_chunks(dw_out.data<A>(), add_dw, partial_w, chunks, e);
  });
}

}  // namespace krait::kernels::cpu

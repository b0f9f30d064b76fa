#pragma once
#include "kernels/cpu/norm.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/cpu/vector_silu.h"

// Rows of the gated norms, whose whole groups are here (gated_rms_norm.cpp) or with several ranks (_split.cpp).
namespace krait::kernels::cpu {

// silu(z), and its slope where wanted, of N vectors.
template <size_t N, bool kSlope, class A, class T>
[[gnu::always_inline]] inline void gate_vectors(A* s, A* slope, const T* z) {
  Vec<A> v[N], d[N];
  detail::each_index<N>([&](size_t i) { v[i] = widened<A>(z + i * kLanes<A>); });
  if constexpr (kSlope) {
    vector_silu_and_slope(v, d);
    detail::each_index<N>([&](size_t i) { store(slope + i * kLanes<A>, d[i]); });
  } else {
    vector_silu(v);
  }
  detail::each_index<N>([&](size_t i) { store(s + i * kLanes<A>, v[i]); });
}

// Of one row. A value's bits do not depend on its place in the row.
template <bool kSlope, class A, class T>
inline void gate_values(A* __restrict s, A* slope, const T* __restrict z, int64_t e) {
  constexpr int64_t kOne = kLanes<A>, kFour = 4 * kOne;
  int64_t j = 0;
  for (; j + kFour <= e; j += kFour) gate_vectors<4, kSlope>(s + j, slope + j, z + j);
  for (; j + kOne <= e; j += kOne) gate_vectors<1, kSlope>(s + j, slope + j, z + j);
  if (j == e) return;
  T rest[kOne] = {};
  A value[kOne], rise[kOne];
  std::copy(z + j, z + e, rest);
  gate_vectors<1, kSlope>(value, rise, rest);
  std::copy(value, value + (e - j), s + j);
  if constexpr (kSlope) std::copy(rise, rise + (e - j), slope + j);
}

template <class T, class A>
void gate_row(A* s, const T* z, int64_t e) {
  gate_values<false>(s, s, z, e);
}

// silu(z) and its slope, of one row.
template <class T, class A>
void gate_rows(A* s, A* slope, const T* z, int64_t e) {
  gate_values<true>(s, slope, z, e);
}

template <class T, class A>
void write_again(T* __restrict y, const T* __restrict x, const A* __restrict s, const A* __restrict w, A rstd, int64_t c) {
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) put(y[j], static_cast<A>(x[j]) * s[j] * rstd * w[j]);
}

// dx and dz of one group, whose mean of w dv vhat is known; adds its part to dw.
template <bool kNormFirst, class T, class A>
void write_gradient(T* __restrict dx, T* __restrict dz, A* __restrict dw, const T* __restrict dy, const T* __restrict x,
                    const A* __restrict s, const A* __restrict slope, const A* __restrict w, A rstd, A mean, int64_t c) {
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) {
    const A up = static_cast<A>(dy[j]), v = static_cast<A>(x[j]);
    const A t = kNormFirst ? up * s[j] : up, vhat = (kNormFirst ? v : v * s[j]) * rstd;
    const A dv = rstd * (t * w[j] - vhat * mean);
    dw[j] += t * vhat;
    put(dx[j], kNormFirst ? dv : dv * s[j]);
    put(dz[j], (kNormFirst ? up * vhat * w[j] : dv * v) * slope[j]);
  }
}

// group(place, c, rstd, dx, dz, dw, dy, x, s, slope, w) for every group of c columns of every row; place counts groups, row
// by row. Rows are cut into chunks by the shape alone, so that dw does not depend on the number of threads.
template <class T, class F>
void backward_rows(Tensor& dx_out, Tensor& dz_out, Tensor& y_out, Tensor& dw_out, bool add_dw, const Tensor& dy_in, const Tensor& x_in,
                   const Tensor& z_in, const Tensor& w_in, const Tensor& rstd_in, F group) {
  using A = accum_t<T>;
  const int64_t r = x_in.size(0), e = x_in.size(1), groups = rstd_in.size(1), c = e / groups;
  const int64_t z_row = z_in.stride(0), dz_row = dz_out.stride(0);
  const int64_t chunk = std::max<int64_t>(16, (r + 127) / 128), chunks = (r + chunk - 1) / chunk;
  const Tensor partial = zeros({chunks, e}, dtype_of<A>, kCpu);
  A* partial_w = partial.data<A>();
  T *dx = dx_out.data<T>(), *dz = dz_out.data<T>(), *y = y_out.defined() ? y_out.data<T>() : nullptr;
  const T *dy = dy_in.data<T>(), *x = x_in.data<T>(), *z = z_in.data<T>();
  const A *w = w_in.data<A>(), *rstd = rstd_in.data<A>();
  parallel_for(0, chunks, std::max<int64_t>(1, kNormGrain / (e * chunk)), [&](int64_t first, int64_t last) {
    const std::unique_ptr<A[]> row(new A[static_cast<size_t>(2 * e)]);
    A *s = row.get(), *slope = s + e;
    for (int64_t k = first; k < last; ++k)
      for (int64_t i = k * chunk; i < std::min(r, (k + 1) * chunk); ++i) {
        gate_rows(s, slope, z + i * z_row, e);
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t at = i * e + g * c, col = g * c;
          const A scale = rstd[i * groups + g];
          group(i * groups + g, c, scale, dx + at, dz + i * dz_row + col, partial_w + k * e + col, dy + at, x + at, s + col, slope + col, w + col);
          if (y != nullptr) write_again(y + at, x + at, s + col, w + col, scale, c);
        }
      }
  });
  sum_chunks(dw_out.data<A>(), add_dw, partial_w, chunks, e);
}

}  // namespace krait::kernels::cpu

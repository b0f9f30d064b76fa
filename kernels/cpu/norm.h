#pragma once
#include <algorithm>
#include <cmath>
#include <memory>

#include "core/parallel.h"
#include "kernels/cpu/put.h"
#include "kernels/norm.h"

// RMSNorm and LayerNorm (kCentred) rows on the CPU; the two differ in the mean and the bias.
namespace krait::kernels::cpu {

inline constexpr int64_t kNormGrain = 16384;  // elements per thread at least

template <class A>
struct RowStatistics { A mean, rstd; };

template <bool kCentred, class A>
RowStatistics<A> row_statistics(const A* __restrict v, int64_t c, A eps) {
  A sum = 0, squares = 0;
  if constexpr (!kCentred) {
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < c; ++i) squares += v[i] * v[i];
    return {0, A(1) / std::sqrt(squares / static_cast<A>(c) + eps)};
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < c; ++i) sum += v[i];
  const A first = sum / static_cast<A>(c);
  // The first mean carries a rounding error of the size of the values; deviations from it correct it.
  sum = 0;
#pragma omp simd reduction(+ : sum, squares)
  for (int64_t i = 0; i < c; ++i) {
    const A d = v[i] - first;
    sum += d;
    squares += d * d;
  }
  const A shift = sum / static_cast<A>(c);
  const A variance = std::max(squares / static_cast<A>(c) - shift * shift, A(0));
  return {first + shift, A(1) / std::sqrt(variance + eps)};
}

// Rows are functions of their own, with pointers as parameters: GCC gathers through captured pointers.
template <class X, class A>
void load_row(A* __restrict v, const X* __restrict x, int64_t c) {
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) v[j] = static_cast<A>(x[j]);
}

// sum = x + residual, rounded; v = that.
template <class X, class R, class A>
void sum_row(R* __restrict sum, A* __restrict v, const X* __restrict x, const R* __restrict residual, int64_t c) {
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) {
    put(sum[j], static_cast<A>(x[j]) + static_cast<A>(residual[j]));
    v[j] = static_cast<A>(sum[j]);
  }
}

template <class X, class A>
void normalise_row(X* __restrict y, const A* __restrict v, const A* __restrict w, const A* __restrict b, A offset,
                   A mean, A rstd, int64_t c) {
  if (b != nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) put(y[j], (v[j] - mean) * rstd * (w[j] + offset) + b[j]);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) put(y[j], (v[j] - mean) * rstd * (w[j] + offset));
  }
}

template <bool kCentred>
void norm_forward(Tensor& y_out, Tensor& sum_out, Tensor& mean_out, Tensor& rstd_out, const Tensor& x_in,
                  const Tensor& residual_in, const Tensor& w_in, const Tensor& b_in, double eps,
                  double weight_offset = 0) {
  const int64_t c = x_in.size(-1), r = x_in.numel() / c;
  const bool fused = residual_in.defined();
  visit_norm(x_in.dtype(), fused ? residual_in.dtype() : x_in.dtype(), [&]<class X, class R>() {
    using A = accum_t<X>;
    X* y_all = y_out.data<X>();
    R* sum_all = fused ? sum_out.data<R>() : nullptr;
    A* mean = kCentred ? mean_out.data<A>() : nullptr;
    A* rstd = rstd_out.data<A>();
    const X* x_all = x_in.data<X>();
    const R* residual_all = fused ? residual_in.data<R>() : nullptr;
    const A* w = w_in.data<A>();
    const A* b = b_in.defined() ? b_in.data<A>() : nullptr;
    parallel_for(0, r, std::max<int64_t>(1, kNormGrain / c), [&](int64_t first, int64_t last) {
      const std::unique_ptr<A[]> row(new A[static_cast<size_t>(c)]);
      A* v = row.get();
      for (int64_t i = first; i < last; ++i) {
        if (fused)
          sum_row(sum_all + i * c, v, x_all + i * c, residual_all + i * c, c);
        else
          load_row(v, x_all + i * c, c);
        const auto s = row_statistics<kCentred>(v, c, static_cast<A>(eps));
        if (kCentred) mean[i] = s.mean;
        rstd[i] = s.rstd;
        normalise_row(y_all + i * c, v, w, b, static_cast<A>(weight_offset), s.mean, s.rstd, c);
      }
    });
  });
}

template <class T, class A>
void add_row(A* __restrict d, const T* __restrict values, int64_t c) {
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) d[j] += static_cast<A>(values[j]);
}

// dst = or += the sum over chunks of partial (chunks, c), in chunk order; partial is spent.
template <class A>
void sum_chunks(A* dst, bool add, A* partial, int64_t chunks, int64_t c) {
  parallel_for(0, c, 4096, [&](int64_t first, int64_t last) {
    for (int64_t k = 1; k < chunks; ++k) add_row(partial + first, partial + k * c + first, last - first);
    if (!add) std::fill(dst + first, dst + last, A(0));
    if (chunks > 0) add_row(dst + first, partial + first, last - first);
  });
}

// One row of the backward. Adds its part to dw and db; leaves the gradient in d (c), a scratch row.
template <bool kCentred, class A, class X, class R>
void backward_row(A* __restrict d, A* __restrict dw, A* __restrict db, const X* __restrict dy, const R* __restrict x,
                  const A* __restrict w, A offset, A mean, A rstd, int64_t c) {
  A sum_g = 0, sum_gx = 0;
#pragma omp simd reduction(+ : sum_g, sum_gx)
  for (int64_t j = 0; j < c; ++j) {
    const A up = static_cast<A>(dy[j]), xhat = (static_cast<A>(x[j]) - mean) * rstd, g = up * (w[j] + offset);
    dw[j] += up * xhat;
    d[j] = g;
    sum_g += g;
    sum_gx += g * xhat;
  }
  if (db != nullptr) {
#pragma omp simd
    for (int64_t j = 0; j < c; ++j) db[j] += static_cast<A>(dy[j]);
  }
  const A mean_g = kCentred ? sum_g / static_cast<A>(c) : A(0), mean_gx = sum_gx / static_cast<A>(c);
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) {
    const A xhat = (static_cast<A>(x[j]) - mean) * rstd;
    d[j] = rstd * (d[j] - mean_g - xhat * mean_gx);
  }
}

template <class T, class A>
void put_row(T* __restrict to, const A* __restrict d, int64_t c) {
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) put(to[j], d[j]);
}

// Rows are cut into chunks by the shape alone, so that dw and db do not depend on the number of threads.
template <bool kCentred>
void norm_backward(Tensor& dr_out, Tensor& dx_out, Tensor& dw_out, bool add_dw, Tensor& db_out, bool add_db,
                   const Tensor& dy_in, const Tensor& dr_in, const Tensor& x_in, const Tensor& w_in,
                   const Tensor& mean_in, const Tensor& rstd_in, double weight_offset = 0) {
  const int64_t c = x_in.size(-1), r = x_in.numel() / c;
  const int64_t chunk = std::max<int64_t>(16, (r + 127) / 128), chunks = (r + chunk - 1) / chunk;
  visit_norm(dy_in.dtype(), x_in.dtype(), [&]<class X, class R>() {
    using A = accum_t<X>;
    const bool want_db = db_out.defined();
    const Tensor partial_w = empty({chunks, c}, dtype_of<A>, kCpu);
    const Tensor partial_b = want_db ? empty({chunks, c}, dtype_of<A>, kCpu) : Tensor();
    A* dw_all = partial_w.data<A>();
    A* db_all = want_db ? partial_b.data<A>() : nullptr;
    R* dr_all = dr_out.data<R>();
    X* dx_all = dx_out.defined() ? dx_out.data<X>() : nullptr;
    const X* dy_all = dy_in.data<X>();
    const R* add_all = dr_in.defined() ? dr_in.data<R>() : nullptr;
    const R* x_all = x_in.data<R>();
    const A* w = w_in.data<A>();
    const A* means = kCentred ? mean_in.data<A>() : nullptr;
    const A* rstds = rstd_in.data<A>();
    parallel_for(0, chunks, std::max<int64_t>(1, kNormGrain / (c * chunk)), [&](int64_t first, int64_t last) {
      const std::unique_ptr<A[]> row(new A[static_cast<size_t>(c)]);
      A* d = row.get();
      for (int64_t k = first; k < last; ++k) {
        A* dw = dw_all + k * c;
        std::fill(dw, dw + c, A(0));
        if (want_db) std::fill(db_all + k * c, db_all + (k + 1) * c, A(0));
        for (int64_t i = k * chunk; i < std::min(r, (k + 1) * chunk); ++i) {
          backward_row<kCentred>(d, dw, want_db ? db_all + k * c : nullptr, dy_all + i * c, x_all + i * c, w,
                                 static_cast<A>(weight_offset), kCentred ? means[i] : A(0), rstds[i], c);
          if (add_all != nullptr) add_row(d, add_all + i * c, c);
          put_row(dr_all + i * c, d, c);
          if (dx_all != nullptr) put_row(dx_all + i * c, d, c);
        }
      }
    });
    sum_chunks(dw_out.data<A>(), add_dw, dw_all, chunks, c);
    if (want_db) sum_chunks(db_out.data<A>(), add_db, db_all, chunks, c);
  });
}

}  // namespace krait::kernels::cpu

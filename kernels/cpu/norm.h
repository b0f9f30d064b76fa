#pragma once
#include <algorithm>
#include <cmath>
#include <memory>

#include "core/parallel.h"
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

template <bool kCentred>
void norm_forward(Tensor& y_out, Tensor& sum_out, Tensor& mean_out, Tensor& rstd_out, const Tensor& x_in,
                  const Tensor& residual_in, const Tensor& w_in, const Tensor& b_in, double eps) {
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
    const A* __restrict w = w_in.data<A>();
    const A* __restrict b = b_in.defined() ? b_in.data<A>() : nullptr;
    parallel_for(0, r, std::max<int64_t>(1, kNormGrain / c), [&](int64_t first, int64_t last) {
      const std::unique_ptr<A[]> row(new A[static_cast<size_t>(c)]);
      A* __restrict v = row.get();
      for (int64_t i = first; i < last; ++i) {
        const X* __restrict x = x_all + i * c;
        X* __restrict y = y_all + i * c;
        if (fused) {
          const R* __restrict residual = residual_all + i * c;
          R* __restrict sum = sum_all + i * c;
#pragma omp simd
          for (int64_t j = 0; j < c; ++j) {
            sum[j] = static_cast<R>(static_cast<A>(x[j]) + static_cast<A>(residual[j]));
            v[j] = static_cast<A>(sum[j]);
          }
        } else {
#pragma omp simd
          for (int64_t j = 0; j < c; ++j) v[j] = static_cast<A>(x[j]);
        }
        const auto s = row_statistics<kCentred>(v, c, static_cast<A>(eps));
        if (kCentred) mean[i] = s.mean;
        rstd[i] = s.rstd;
        if (b != nullptr) {
#pragma omp simd
          for (int64_t j = 0; j < c; ++j) y[j] = static_cast<X>((v[j] - s.mean) * s.rstd * w[j] + b[j]);
        } else {
#pragma omp simd
          for (int64_t j = 0; j < c; ++j) y[j] = static_cast<X>((v[j] - s.mean) * s.rstd * w[j]);
        }
      }
    });
  });
}

// dst = or += the sum over chunks of partial (chunks, c), in chunk order; partial is spent.
template <class A>
void sum_chunks(A* dst, bool add, A* partial, int64_t chunks, int64_t c) {
  parallel_for(0, c, 4096, [&](int64_t first, int64_t last) {
    A* __restrict sum = partial;
    for (int64_t k = 1; k < chunks; ++k) {
      const A* __restrict p = partial + k * c;
#pragma omp simd
      for (int64_t j = first; j < last; ++j) sum[j] += p[j];
    }
    for (int64_t j = first; j < last; ++j) dst[j] = (add ? dst[j] : A(0)) + (chunks > 0 ? sum[j] : A(0));
  });
}

// Rows are cut into chunks by the shape alone, so that dw and db do not depend on the number of threads.
template <bool kCentred>
void norm_backward(Tensor& dr_out, Tensor& dx_out, Tensor& dw_out, bool add_dw, Tensor& db_out, bool add_db,
                   const Tensor& dy_in, const Tensor& dr_in, const Tensor& x_in, const Tensor& w_in,
                   const Tensor& mean_in, const Tensor& rstd_in) {
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
    const A* __restrict w = w_in.data<A>();
    const A* means = kCentred ? mean_in.data<A>() : nullptr;
    const A* rstds = rstd_in.data<A>();
    const A per_c = A(1) / static_cast<A>(c);
    parallel_for(0, chunks, std::max<int64_t>(1, kNormGrain / (c * chunk)), [&](int64_t first, int64_t last) {
      const std::unique_ptr<A[]> row(new A[static_cast<size_t>(c)]);
      A* __restrict d = row.get();
      for (int64_t k = first; k < last; ++k) {
        A* __restrict dw = dw_all + k * c;
        std::fill(dw, dw + c, A(0));
        if (want_db) std::fill(db_all + k * c, db_all + (k + 1) * c, A(0));
        for (int64_t i = k * chunk; i < std::min(r, (k + 1) * chunk); ++i) {
          const X* __restrict dy = dy_all + i * c;
          const R* __restrict x = x_all + i * c;
          const A mean = kCentred ? means[i] : A(0), rstd = rstds[i];
          A sum_g = 0, sum_gx = 0;
#pragma omp simd reduction(+ : sum_g, sum_gx)
          for (int64_t j = 0; j < c; ++j) {
            const A up = static_cast<A>(dy[j]), xhat = (static_cast<A>(x[j]) - mean) * rstd, g = up * w[j];
            dw[j] += up * xhat;
            d[j] = g;
            sum_g += g;
            sum_gx += g * xhat;
          }
          if (want_db) {
            A* __restrict db = db_all + k * c;
#pragma omp simd
            for (int64_t j = 0; j < c; ++j) db[j] += static_cast<A>(dy[j]);
          }
          const A mean_g = kCentred ? sum_g * per_c : A(0), mean_gx = sum_gx * per_c;
#pragma omp simd
          for (int64_t j = 0; j < c; ++j) {
            const A xhat = (static_cast<A>(x[j]) - mean) * rstd;
            d[j] = rstd * (d[j] - mean_g - xhat * mean_gx);
          }
          if (add_all != nullptr) {
            const R* __restrict add = add_all + i * c;
#pragma omp simd
            for (int64_t j = 0; j < c; ++j) d[j] += static_cast<A>(add[j]);
          }
          R* __restrict dr = dr_all + i * c;
#pragma omp simd
          for (int64_t j = 0; j < c; ++j) dr[j] = static_cast<R>(d[j]);
          if (dx_all != nullptr) {
            X* __restrict dx = dx_all + i * c;
#pragma omp simd
            for (int64_t j = 0; j < c; ++j) dx[j] = static_cast<X>(d[j]);
          }
        }
      }
    });
    sum_chunks(dw_out.data<A>(), add_dw, dw_all, chunks, c);
    if (want_db) sum_chunks(db_out.data<A>(), add_db, db_all, chunks, c);
  });
}

}  // namespace krait::kernels::cpu

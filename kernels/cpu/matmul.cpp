#include "kernels/matmul.h"

#include <cblas.h>
#include <omp.h>

#include "core/parallel.h"
#include "kernels/cpu/gemm.h"

namespace krait::kernels::cpu {

namespace {

CBLAS_TRANSPOSE op(bool trans) { return trans ? CblasTrans : CblasNoTrans; }

MatrixRef ref(const float* data, bool trans, int64_t ld) {
  return trans ? MatrixRef{data, 1, ld} : MatrixRef{data, ld, 1};
}

// Within a piece of parallel work the BLAS, whose threads are OpenMP's, stays on the calling thread.
struct BlasThreads {
  BlasThreads() { omp_set_num_threads(in_parallel() ? 1 : num_threads()); }
  ~BlasThreads() { omp_set_num_threads(num_threads()); }
};

void check_blas_sizes(const Gemm& g) {
  constexpr int64_t kMax = INT32_MAX;
  KRAIT_CHECK(g.m <= kMax && g.n <= kMax && g.k <= kMax && g.lda <= kMax && g.ldb <= kMax && g.ldc <= kMax,
              "matmul: {} x {} x {} is beyond the 32-bit sizes of BLAS", g.m, g.k, g.n);
}

void product(const Gemm& g, const float* a, const float* b, float* c) {
  const auto alpha = static_cast<float>(g.alpha), beta = static_cast<float>(g.beta);
  if (blocked(g)) {
    sgemm(g.m, g.n, g.k, alpha, ref(a, g.trans_a, g.lda), ref(b, g.trans_b, g.ldb), beta, c, g.ldc);
    return;
  }
  check_blas_sizes(g);
  const BlasThreads threads;
  const auto i = [](int64_t v) { return static_cast<int>(v); };
  cblas_sgemm(CblasRowMajor, op(g.trans_a), op(g.trans_b), i(g.m), i(g.n), i(g.k), alpha, a, i(g.lda), b, i(g.ldb),
              beta, c, i(g.ldc));
}

void product(const Gemm& g, const double* a, const double* b, double* c) {
  check_blas_sizes(g);
  const BlasThreads threads;
  const auto i = [](int64_t v) { return static_cast<int>(v); };
  cblas_dgemm(CblasRowMajor, op(g.trans_a), op(g.trans_b), i(g.m), i(g.n), i(g.k), g.alpha, a, i(g.lda), b, i(g.ldb),
              g.beta, c, i(g.ldc));
}

void widen(float* to, const bf16* from, int64_t rows, int64_t columns, int64_t ld) {
  parallel_for(0, rows, 1 + 16384 / std::max<int64_t>(columns, 1), [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      float* __restrict t = to + r * columns;
      const bf16* __restrict f = from + r * ld;
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) t[j] = f[j];
    }
  });
}

// bf16 products in fp32, a block of rows of c at a time so that the wide copies stay small.
void product(const Gemm& g, const bf16* a, const bf16* b) {
  constexpr int64_t kBlock = 1024;
  const int64_t rows = std::min(kBlock, g.m), b_rows = g.trans_b ? g.n : g.k, b_columns = g.trans_b ? g.k : g.n;
  const bool wide_c = g.c_dtype == DType::f32;
  const Tensor wide = empty({b_rows * b_columns + rows * g.k + (wide_c ? 0 : rows * g.n)}, DType::f32, kCpu);
  float* fb = wide.data<float>();
  float* fa = fb + b_rows * b_columns;
  float* fc = fa + rows * g.k;
  widen(fb, b, b_rows, b_columns, g.ldb);
  Gemm part = g;
  part.ldb = b_columns;
  for (int64_t i = 0; i < g.m; i += kBlock) {
    part.m = std::min(kBlock, g.m - i);
    part.lda = g.trans_a ? part.m : g.k;
    if (g.trans_a)
      widen(fa, a + i, g.k, part.m, g.lda);
    else
      widen(fa, a + i * g.lda, part.m, g.k, g.lda);
    if (wide_c) {
      product(part, fa, fb, static_cast<float*>(g.c) + i * g.ldc);
      continue;
    }
    bf16* c = static_cast<bf16*>(g.c) + i * g.ldc;
    if (g.beta != 0.0) widen(fc, c, part.m, g.n, g.ldc);
    part.ldc = g.n;
    product(part, fa, fb, fc);
    parallel_for(0, part.m, 1 + 16384 / g.n, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
#pragma omp simd
        for (int64_t j = 0; j < g.n; ++j) c[r * g.ldc + j] = bf16(fc[r * g.n + j]);
      }
    });
  }
}

template <class T>
void entry(const Gemm& g, int64_t i) {
  const T* a = static_cast<const T*>(g.a) + i * g.batch_a;
  const T* b = static_cast<const T*>(g.b) + i * g.batch_b;
  if constexpr (std::is_same_v<T, bf16>) {
    Gemm one = g;
    one.c = static_cast<std::byte*>(g.c) + i * g.batch_c * size_of(g.c_dtype);
    product(one, a, b);
  } else {
    product(g, a, b, static_cast<T*>(g.c) + i * g.batch_c);
  }
}

}  // namespace

// Measured on two AVX-512 cores: packing pays from a few rows on, up to very deep products with transposed a, where
// the library's own blocking of k is better.
bool blocked(const Gemm& g) {
  const bool few = g.m < 8 || g.n < 8;
  const bool deep = g.trans_a && g.k > 4096;
  return !few && !deep;
}

void blocked_product(const Gemm& g, const BlockDone& done) {
  sgemm(g.m, g.n, g.k, static_cast<float>(g.alpha), ref(static_cast<const float*>(g.a), g.trans_a, g.lda),
        ref(static_cast<const float*>(g.b), g.trans_b, g.ldb), static_cast<float>(g.beta), static_cast<float*>(g.c),
        g.ldc, done);
}

void gemm(const Gemm& g) {
  visit_float(g.dtype, [&]<class T>() {
    if (g.batch == 1) return entry<T>(g, 0);
    // Enough entries: one thread each.
    const bool large = 2 * g.batch >= 3 * num_threads() || g.m * g.n * g.k < 100'000;
    parallel_for(0, g.batch, large ? 1 : g.batch, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) entry<T>(g, i);
    });
  });
}

}  // namespace krait::kernels::cpu

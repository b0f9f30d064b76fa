#include "kernels/linear.h"

#include <algorithm>

#include "core/parallel.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/vector_activation.h"
#include "kernels/epilogue.h"

namespace krait::kernels::cpu {

namespace {

template <Epilogue e> struct FunctionOf;
template <> struct FunctionOf<Epilogue::gelu_tanh> : GeluTanh {};
template <> struct FunctionOf<Epilogue::gelu_erf> : GeluErf {};
template <> struct FunctionOf<Epilogue::relu> : Relu {};

// y = epilogue(y + bias) on a block of an (r, n) matrix; y + bias also goes to pre when given.
template <Epilogue e, class T>
void finish(T* y, T* pre, const T* bias, int64_t n, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  using A = accum_t<T>;
  for (int64_t i = i0; i < i1; ++i) {
    T* row = y + i * n;
    if (bias) {
#pragma omp simd
      for (int64_t j = j0; j < j1; ++j) row[j] = static_cast<T>(static_cast<A>(row[j]) + static_cast<A>(bias[j]));
    }
    if constexpr (e != Epilogue::none) {
      if (pre) std::copy(row + j0, row + j1, pre + i * n + j0);
      map_activation<FunctionOf<e>, T, 1, 0>({row + j0}, row + j0, {}, j1 - j0, [](auto value, auto) { return std::array{value}; });
    }
  }
}

constexpr int64_t kChunk = 64;  // rows whose column sums are made in one go

// g = dy epilogue'(pre) for rows [i0, i1), sums[j] = sum of g over them.
template <Epilogue e, class T>
void gradient_rows(T* g, accum_t<T>* sums, const T* dy, const T* pre, int64_t n, int64_t i0, int64_t i1) {
  using A = accum_t<T>;
  if (sums) std::fill(sums, sums + n, A(0));
  for (int64_t i = i0; i < i1; ++i) {
    const T* __restrict from = dy + i * n;
    if constexpr (e != Epilogue::none) {
      map_activation<FunctionOf<e>, T, 1, 1>({g + i * n}, pre + i * n, {from}, n,
                                             [](auto, auto slope, auto up) { return std::array{up * slope}; });
      from = g + i * n;
    }
    if (sums) {
      A* __restrict s = sums;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) s[j] += static_cast<A>(from[j]);
    }
  }
}

template <class D, class A>
void add_chunks(D* db, const A* partial, int64_t chunks, int64_t n, bool add) {
  parallel_for(0, n, 4096, [&](int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j) {
      A sum = A(0);
      for (int64_t q = 0; q < chunks; ++q) sum += partial[q * n + j];
      db[j] = static_cast<D>(add ? static_cast<A>(db[j]) + sum : sum);
    }
  });
}

}  // namespace

void linear_forward(Tensor& y, Tensor& pre, const Gemm& g, const Tensor& bias, Epilogue epilogue) {
  const bool plain = !bias.defined() && epilogue == Epilogue::none;
  if (plain) return gemm(g);
  visit_float(y.dtype(), [&]<class T>() {
    visit_epilogue(epilogue, [&]<Epilogue e>() {
      T* out = y.data<T>();
      T* saved = pre.defined() ? pre.data<T>() : nullptr;
      const T* b = bias.defined() ? bias.data<T>() : nullptr;
      const auto done = [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
        finish<e>(out, saved, b, g.n, i0, i1, j0, j1);
      };
      if constexpr (std::is_same_v<T, float>) {
        if (blocked(g)) return blocked_product(g, done);  // while the block is in cache
      }
      gemm(g);
      parallel_for(0, g.m, 1 + 8192 / g.n, [&](int64_t first, int64_t last) { done(first, last, 0, g.n); });
    });
  });
}

void linear_gradient(Tensor& g, Tensor& db, const Tensor& dy, const Tensor& pre, Epilogue epilogue, bool add_db) {
  const int64_t rows = dy.size(0), n = dy.size(1), chunks = (rows + kChunk - 1) / kChunk;
  visit_float(dy.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Tensor partial = db.defined() ? empty({chunks, n}, dtype_of<A>, kCpu) : Tensor{};
    A* sums = db.defined() ? partial.data<A>() : nullptr;
    visit_epilogue(epilogue, [&]<Epilogue e>() {
      T* to = g.defined() ? g.data<T>() : nullptr;
      const T* x = pre.defined() ? pre.data<T>() : nullptr;
      parallel_for(0, chunks, 1 + 16384 / (kChunk * n), [&](int64_t first, int64_t last) {
        for (int64_t q = first; q < last; ++q)
          gradient_rows<e>(to, sums ? sums + q * n : nullptr, dy.data<T>(), x, n, q * kChunk,
                           std::min(rows, (q + 1) * kChunk));
      });
    });
    if (db.defined())
      visit_float(db.dtype(), [&]<class D>() { add_chunks(db.data<D>(), sums, chunks, n, add_db); });
  });
}

}  // namespace krait::kernels::cpu

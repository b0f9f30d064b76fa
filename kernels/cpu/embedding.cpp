#include "kernels/embedding.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "core/parallel.h"
#include "kernels/cpu/put.h"
#include "kernels/norm.h"

namespace krait::kernels::cpu {

namespace {

template <class I>
void check_range(const I* tokens, int64_t n, int64_t v) {
  for (int64_t i = 0; i < n; ++i)
    KRAIT_CHECK(tokens[i] >= 0 && tokens[i] < v, "embedding: token {} at position {} is outside [0, {})",
                static_cast<int64_t>(tokens[i]), i, v);
}

// Functions of their own, with pointers as parameters: GCC gathers through captured pointers.
template <class T, class A>
void add_row(A* __restrict sum, const T* __restrict row, int64_t d) {
#pragma omp simd
  for (int64_t j = 0; j < d; ++j) sum[j] += static_cast<A>(row[j]);
}

template <class D, class A>
void add_to_row(D* __restrict to, const A* __restrict sum, int64_t d) {
#pragma omp simd
  for (int64_t j = 0; j < d; ++j) put(to[j], static_cast<A>(to[j]) + sum[j]);
}

}  // namespace

void embedding_forward(Tensor& y, const Tensor& table, const Tensor& tokens, TableRows rows) {
  const int64_t v = table.size(0), n = tokens.numel(), row = table.size(1) * size_of(table.dtype());
  visit_index(tokens.dtype(), [&]<class I>() {
    const I* t = tokens.data<I>();
    check_range(t, n, rows.whole);
    if (n == 0 || row == 0) return;
    const char* from = static_cast<const char*>(table.raw_data());
    char* to = static_cast<char*>(y.raw_data());
    parallel_for(0, n, std::max<int64_t>(1, 65536 / row), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t token = static_cast<int64_t>(t[i]) - rows.first;
        if (token >= 0 && token < v)
          std::memcpy(to + i * row, from + token * row, static_cast<size_t>(row));
        else
          std::memset(to + i * row, 0, static_cast<size_t>(row));
      }
    });
  });
}

// Positions are grouped by token with a counting sort, which keeps their order; each token's run is summed once.
void embedding_backward(Tensor& dtable, const Tensor& dy, const Tensor& tokens, TableRows rows) {
  const int64_t v = dtable.size(0), d = dtable.size(1), n = tokens.numel();
  // Those of other rows of a whole table come last, as token v.
  std::vector<int64_t> order(static_cast<size_t>(n)), first_of(static_cast<size_t>(v) + 2, 0);
  visit_index(tokens.dtype(), [&]<class I>() {
    const I* t = tokens.data<I>();
    check_range(t, n, rows.whole);
    const auto token = [&](int64_t i) {
      const int64_t k = static_cast<int64_t>(t[i]) - rows.first;
      return static_cast<size_t>(k >= 0 && k < v ? k : v);
    };
    for (int64_t i = 0; i < n; ++i) ++first_of[token(i) + 1];
    for (size_t k = 0; k <= static_cast<size_t>(v); ++k) first_of[k + 1] += first_of[k];
    std::vector<int64_t> next(first_of.begin(), first_of.end() - 1);
    for (int64_t i = 0; i < n; ++i) order[static_cast<size_t>(next[token(i)]++)] = i;
  });
  std::vector<int64_t> used;
  for (int64_t k = 0; k < v; ++k)
    if (first_of[static_cast<size_t>(k) + 1] > first_of[static_cast<size_t>(k)]) used.push_back(k);
  const int64_t runs = static_cast<int64_t>(used.size());

  visit_norm(dy.dtype(), dtable.dtype(), [&]<class T, class D>() {
    using A = accum_t<D>;
    D* out = dtable.data<D>();
    const T* g = dy.data<T>();
    parallel_for(0, runs, std::max<int64_t>(1, 16384 * runs / (n * d)), [&](int64_t first, int64_t last) {
      const std::unique_ptr<A[]> buffer(new A[static_cast<size_t>(d)]);
      A* sum = buffer.get();
      for (int64_t r = first; r < last; ++r) {
        const size_t token = static_cast<size_t>(used[static_cast<size_t>(r)]);
        std::fill(sum, sum + d, A(0));
        for (int64_t k = first_of[token]; k < first_of[token + 1]; ++k)
          add_row(sum, g + order[static_cast<size_t>(k)] * d, d);
        add_to_row(out + static_cast<int64_t>(token) * d, sum, d);
      }
    });
  });
}

}  // namespace krait::kernels::cpu

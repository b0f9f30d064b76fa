#pragma once
// Small dense products on packed tiles, for attention. Every tile is padded with zeros to whole vectors and to
// kStrip rows, so that no loop has a tail.
#include <cstring>
#include <type_traits>

#include "core/dtype.h"
#include "kernels/cpu/vector_bytes.h"

namespace krait::kernels::cpu {

inline constexpr int kStrip = kVectorBytes == 64 ? 8 : 4;  // rows of one register block: x 2 accumulators of 32 or 16 registers
template <class A> inline constexpr int kLanes = static_cast<int>(kVectorBytes / sizeof(A));
template <class A> struct VectorOf { typedef A type __attribute__((vector_size(kVectorBytes))); };
template <class A> using Vec = typename VectorOf<A>::type;

template <class A> using LaneIndex = Vec<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>>;

template <class A> inline Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class A> inline void store(A* p, const Vec<A>& v) { std::memcpy(p, &v, sizeof v); }

/// Keeps a loaded vector in its register. GCC else makes the load an operand of every product that reads it, and loads
/// are what such loops have most of.
template <class V>
[[gnu::always_inline]] inline void keep(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/// One register block: c (kStrip, NV vectors) = a b, or += with `add`; a(i,x) = a[i a_row + x a_col], b (k, .).
template <class A, int NV>
inline void multiply_block(A* c, int64_t c_row, const A* a, int64_t a_row, int64_t a_col, const A* b, int64_t b_row,
                           int64_t k, bool add) {
  Vec<A> sum[kStrip][NV];
#pragma GCC unroll 8
  for (int i = 0; i < kStrip; ++i)
    for (int j = 0; j < NV; ++j) sum[i][j] = add ? load(c + i * c_row + j * kLanes<A>) : Vec<A>{};
  for (int64_t x = 0; x < k; ++x) {
    Vec<A> row[NV];
    for (int j = 0; j < NV; ++j) {
      row[j] = load(b + x * b_row + j * kLanes<A>);
      keep(row[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kStrip; ++i) {
      const A factor = a[i * a_row + x * a_col];
      for (int j = 0; j < NV; ++j) sum[i][j] += factor * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kStrip; ++i)
    for (int j = 0; j < NV; ++j) store(c + i * c_row + j * kLanes<A>, sum[i][j]);
}

/// c (kStrip, n) = a (kStrip, k) b (k, n); n a multiple of the vector length.
template <class A>
inline void multiply_strip(A* c, int64_t c_row, const A* a, int64_t a_row, int64_t a_col, const A* b, int64_t b_row,
                           int64_t n, int64_t k, bool add) {
  constexpr int64_t kPair = 2 * kLanes<A>;
  int64_t j = 0;
  for (; j + kPair <= n; j += kPair) multiply_block<A, 2>(c + j, c_row, a, a_row, a_col, b + j, b_row, k, add);
  if (j < n) multiply_block<A, 1>(c + j, c_row, a, a_row, a_col, b + j, b_row, k, add);
}

/// to (padded_rows, to_row) = factor * from (rows, d), zero where from has nothing.
template <class A, class T>
inline void pack_rows(A* to, int64_t to_row, const T* from, int64_t from_row, int64_t rows, int64_t d,
                      int64_t padded_rows, A factor = 1) {
  for (int64_t i = 0; i < rows; ++i) {
    A* out = to + i * to_row;
    const T* in = from + i * from_row;
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) out[c] = static_cast<A>(in[c]) * factor;
    for (int64_t c = d; c < to_row; ++c) out[c] = 0;
  }
  if (rows < padded_rows) std::memset(to + rows * to_row, 0, static_cast<size_t>((padded_rows - rows) * to_row) * sizeof(A));
}

/// A square of kLanes x kLanes values. One round interleaves row i with row i + n/2: it rotates the bits of the
/// index (row, column) by one, so log2(n) rounds exchange row and column.
template <class A>
inline void transpose_square(A* to, int64_t to_row, const A* from, int64_t from_row) {
  constexpr int n = kLanes<A>;
  LaneIndex<A> low{}, high{};
  for (int l = 0; l < n; ++l) {
    low[l] = l / 2 + (l % 2) * n;
    high[l] = n / 2 + l / 2 + (l % 2) * n;
  }
  Vec<A> x[n], y[n];
  for (int i = 0; i < n; ++i) x[i] = load(from + i * from_row);
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + n / 2], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + n / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) x[i] = y[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) store(to + i * to_row, x[i]);
}

/// to (cols, to_row) = from (rows, from_row) transposed; both sizes are multiples of the vector length.
template <class A>
inline void transpose(A* to, int64_t to_row, const A* from, int64_t from_row, int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < rows; i += kLanes<A>)
    for (int64_t c = 0; c < cols; c += kLanes<A>)
      transpose_square(to + c * to_row + i, to_row, from + i * from_row + c, from_row);
}

/// The largest value, or the sum, of all lanes: halves are folded onto each other.
template <class A, int W, class Fold>
inline A fold_lanes(const Vec<A>& v, Fold&& fold) {
  if constexpr (W == 0) {
    return v[0];
  } else {
    LaneIndex<A> other{};
    for (int l = 0; l < kLanes<A>; ++l) other[l] = l ^ W;
    return fold_lanes<A, W / 2>(fold(v, __builtin_shuffle(v, other)), fold);
  }
}
template <class A>
inline A largest(const Vec<A>& v) {
  return fold_lanes<A, kLanes<A> / 2>(v, [](const Vec<A>& a, const Vec<A>& b) -> Vec<A> { return a > b ? a : b; });
}
template <class A>
inline A total(const Vec<A>& v) {
  return fold_lanes<A, kLanes<A> / 2>(v, [](const Vec<A>& a, const Vec<A>& b) -> Vec<A> { return a + b; });
}

}  // namespace krait::kernels::cpu

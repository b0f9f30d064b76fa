#pragma once
// Transform of polynomials modulo x^n - i (see kernels/fft_conv.h), n a power of two, for one channel per vector lane:
// every butterfly is whole vectors with one factor, and nothing is ever shuffled.
#include <array>
#include <cmath>
#include <cstdint>
#include <mutex>
#include <vector>

#include "kernels/cpu/vector_bytes.h"

namespace krait::kernels::cpu {

template <class A>
struct LaneVector {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Lanes = typename LaneVector<A>::type;
template <class A>
inline constexpr int64_t kLanes = kVectorBytes / sizeof(A);

/// One position of kLanes channels.
template <class A>
struct LaneComplex {
  Lanes<A> re, im;
};

template <class A>
struct Root {
  A re, im;
};
template <class A>
[[gnu::always_inline]] inline Root<A> times(Root<A> a, Root<A> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class A>
[[gnu::always_inline]] inline LaneComplex<A> times(Root<A> w, const LaneComplex<A>& x) {
  return {w.re * x.re - w.im * x.im, w.re * x.im + w.im * x.re};
}
/// conj(w) x
template <class A>
[[gnu::always_inline]] inline LaneComplex<A> times_conj(Root<A> w, const LaneComplex<A>& x) {
  return {w.re * x.re + w.im * x.im, w.re * x.im - w.im * x.re};
}

/// The angle, in turns, of the root that splits node q = 2^j + m of the tree, x^k - w^2 = (x^{k/2} - w)(x^{k/2} + w).
/// Children of q: 2q for the first factor, 2q + 1 for the second; the root of the tree is 1 with w^2 = i.
inline double ring_angle(int64_t q) {
  int j = 0;
  while ((q >> (j + 1)) > 0) ++j;
  double turns = std::ldexp(1.0, -j - 3);
  for (int bit = 0; bit < j; ++bit)
    if ((q >> bit) & 1) turns += std::ldexp(1.0, -bit - 2);
  return turns;
}

/// w of the nodes 1 .. 2^log2n - 1, by node.
template <class A>
const Root<A>* ring_roots(int log2n) {
  static std::array<std::once_flag, 48> made;
  static std::array<std::vector<Root<A>>, 48> tables;
  const auto i = static_cast<size_t>(log2n);
  std::call_once(made[i], [&] {
    std::vector<Root<A>>& t = tables[i];
    t.resize(size_t{1} << log2n);
    for (size_t q = 1; q < t.size(); ++q) {
      const double angle = 2.0 * M_PI * ring_angle(static_cast<int64_t>(q));
      t[q] = {static_cast<A>(std::cos(angle)), static_cast<A>(std::sin(angle))};
    }
  });
  return tables[i].data();
}

namespace detail {

/// Two levels at node q: n values become four blocks of n / 4.
template <class A>
[[gnu::always_inline]] inline void ring_split(LaneComplex<A>* __restrict x, int64_t n, Root<A> w1, Root<A> w2) {
  const int64_t s = n / 4;
  const Root<A> w3 = times(w1, w2);
  for (int64_t k = 0; k < s; ++k) {
    const LaneComplex<A> a = x[k], b = times(w2, x[k + s]), c = times(w1, x[k + 2 * s]), d = times(w3, x[k + 3 * s]);
    const LaneComplex<A> p{a.re + c.re, a.im + c.im}, m{a.re - c.re, a.im - c.im};
    const LaneComplex<A> e{b.re + d.re, b.im + d.im}, f{b.re - d.re, b.im - d.im};
    x[k] = {p.re + e.re, p.im + e.im};
    x[k + s] = {p.re - e.re, p.im - e.im};
    x[k + 2 * s] = {m.re - f.im, m.im + f.re};
    x[k + 3 * s] = {m.re + f.im, m.im - f.re};
  }
}

/// Undoes ring_split, times 4.
template <class A>
[[gnu::always_inline]] inline void ring_join(LaneComplex<A>* __restrict x, int64_t n, Root<A> w1, Root<A> w2) {
  const int64_t s = n / 4;
  const Root<A> w3 = times(w1, w2);
  for (int64_t k = 0; k < s; ++k) {
    const LaneComplex<A> y0 = x[k], y1 = x[k + s], y2 = x[k + 2 * s], y3 = x[k + 3 * s];
    const LaneComplex<A> p{y0.re + y1.re, y0.im + y1.im}, e{y0.re - y1.re, y0.im - y1.im};
    const LaneComplex<A> m{y2.re + y3.re, y2.im + y3.im}, f{y2.re - y3.re, y2.im - y3.im};
    x[k] = {p.re + m.re, p.im + m.im};
    x[k + s] = times_conj(w2, LaneComplex<A>{e.re + f.im, e.im - f.re});
    x[k + 2 * s] = times_conj(w1, LaneComplex<A>{p.re - m.re, p.im - m.im});
    x[k + 3 * s] = times_conj(w3, LaneComplex<A>{e.re - f.im, e.im + f.re});
  }
}

inline constexpr int64_t kInCache = 256;  // values worked on level by level; longer blocks one after the other

template <class A>
void ring_forward_block(LaneComplex<A>* x, int64_t n, int64_t q, const Root<A>* w) {
  if (n > kInCache) {
    ring_split(x, n, w[q], w[2 * q]);
    for (int64_t i = 0; i < 4; ++i) ring_forward_block(x + i * n / 4, n / 4, 4 * q + i, w);
    return;
  }
  for (int64_t size = n, nodes = 1; size >= 4; size /= 4, nodes *= 4)
    for (int64_t m = 0; m < nodes; ++m) ring_split(x + m * size, size, w[q * nodes + m], w[2 * (q * nodes + m)]);
}

template <class A>
void ring_inverse_block(LaneComplex<A>* x, int64_t n, int64_t q, const Root<A>* w) {
  if (n > kInCache) {
    for (int64_t i = 0; i < 4; ++i) ring_inverse_block(x + i * n / 4, n / 4, 4 * q + i, w);
    ring_join(x, n, w[q], w[2 * q]);
    return;
  }
  for (int64_t size = 4, nodes = n / 4; size <= n; size *= 4, nodes /= 4)
    for (int64_t m = 0; m < nodes; ++m) ring_join(x + m * size, size, w[q * nodes + m], w[2 * (q * nodes + m)]);
}

}  // namespace detail

/// In place, to the values at the n roots of x^n = i in the tree's order.
template <class A>
void ring_forward(LaneComplex<A>* x, int log2n, const Root<A>* w) {
  const int64_t n = int64_t{1} << log2n;
  if (log2n % 2 == 0) return detail::ring_forward_block(x, n, 1, w);
  for (int64_t k = 0; k < n / 2; ++k) {
    const LaneComplex<A> a = x[k], b = times(w[1], x[k + n / 2]);
    x[k] = {a.re + b.re, a.im + b.im};
    x[k + n / 2] = {a.re - b.re, a.im - b.im};
  }
  detail::ring_forward_block(x, n / 2, 2, w);
  detail::ring_forward_block(x + n / 2, n / 2, 3, w);
}

/// Undoes ring_forward, times n.
template <class A>
void ring_inverse(LaneComplex<A>* x, int log2n, const Root<A>* w) {
  const int64_t n = int64_t{1} << log2n;
  if (log2n % 2 == 0) return detail::ring_inverse_block(x, n, 1, w);
  detail::ring_inverse_block(x, n / 2, 2, w);
  detail::ring_inverse_block(x + n / 2, n / 2, 3, w);
  for (int64_t k = 0; k < n / 2; ++k) {
    const LaneComplex<A> a = x[k], b = x[k + n / 2];
    x[k] = {a.re + b.re, a.im + b.im};
    x[k + n / 2] = times_conj(w[1], LaneComplex<A>{a.re - b.re, a.im - b.im});
  }
}

}  // namespace krait::kernels::cpu

#pragma once
// One (batch, key head) of attention on the CPU: packed keys, score strips and their masks.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/attention_dropout.h"
#include "kernels/attention_mask.h"
#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/philox_words.h"
#include "kernels/cpu/vector_math.h"

namespace krait::kernels::cpu {

inline constexpr int64_t kTile = 64;  // queries and keys of one tile

/// A thread's workspace: 64-byte aligned pieces of one block.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t values) : block_(empty({values + 1024}, dtype_of<A>, kCpu)), next_(block_.data<A>()) {}
  A* take(int64_t values) {
    A* p = next_;
    next_ += round_up(values, 64);
    return p;
  }

 private:
  Tensor block_;
  A* next_;
};

/// A (b, l, heads, d) tensor with any strides but the last.
template <class T>
struct Rows {
  T* data;
  int64_t batch, row, head;
  explicit Rows(const Tensor& t) : data(t.data<T>()), batch(t.stride(0)), row(t.stride(1)), head(t.stride(2)) {}
  T* at(int64_t b, int64_t l, int64_t h) const { return data + b * batch + l * row + h * head; }
};

/// What strip rows [0, kStrip) from query i0 see of the tile of keys [j0, j0 + kTile).
struct StripView {
  int64_t low[kStrip], high[kStrip];  // per row, relative to j0
  int64_t first, last;                // columns to compute: whole vectors; first >= last: none
  bool partial;                       // some computed column is unseen by some row
};

class TileMask {
 public:
  TileMask(const AttentionMask& mask, int64_t batch) : mask_(mask), batch_(batch) {
    if (mask.q_segments) {
      q_ids_ = mask.q_segments + batch * mask.lq;
      k_ids_ = mask.k_segments + batch * mask.lk;
    }
  }

  int64_t key_begin(int64_t i) const { return mask_.key_begin(batch_, i); }
  int64_t key_end(int64_t i) const { return mask_.key_end(batch_, i); }
  bool has_segments() const { return q_ids_ != nullptr; }

  /// Document ids of a strip's queries and of a tile's keys have no value in common for certain.
  bool disjoint(int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    if (!q_ids_) return false;
    const auto [qa, qb] = std::minmax_element(q_ids_ + i0, q_ids_ + i1);
    const auto [ka, kb] = std::minmax_element(k_ids_ + j0, k_ids_ + j1);
    return *qb < *ka || *kb < *qa;
  }

  /// Rows from lq on are padding: they see what the last row sees.
  template <class A>
  StripView strip(int64_t i0, int64_t j0) const {
    StripView view;
    const int64_t valid = std::min<int64_t>(kStrip, mask_.lq - i0);
    for (int64_t r = 0; r < kStrip; ++r) {
      const int64_t i = i0 + std::min(r, valid - 1);
      view.low[r] = std::clamp<int64_t>(key_begin(i) - j0, 0, kTile);
      view.high[r] = std::clamp<int64_t>(key_end(i) - j0, view.low[r], kTile);
    }
    view.first = view.low[0] / kLanes<A> * kLanes<A>;
    view.last = view.high[kStrip - 1] > view.low[0] ? round_up(view.high[kStrip - 1], kLanes<A>) : view.first;
    view.partial = has_segments();
    for (int64_t r = 0; r < kStrip; ++r) view.partial |= view.low[r] > view.first || view.high[r] < view.last;
    return view;
  }

  /// Adds the bias of ALiBi to the scores of row i and sets unseen ones to -infinity.
  template <class A>
  void apply(A* s, const StripView& view, int64_t r, int64_t i0, int64_t j0, A slope) const {
    const int64_t i = std::min(i0 + r, mask_.lq - 1);
    if (slope != 0) {
      const A distance = static_cast<A>(mask_.position(batch_, i) - j0);
      for (int64_t j = view.first; j < view.last; ++j) s[j] -= slope * std::abs(distance - static_cast<A>(j));
    }
    if (!view.partial) return;
    constexpr A kNone = -std::numeric_limits<A>::infinity();
    for (int64_t j = view.first; j < view.low[r]; ++j) s[j] = kNone;
    for (int64_t j = view.high[r]; j < view.last; ++j) s[j] = kNone;
    if (q_ids_)
      for (int64_t j = view.low[r]; j < view.high[r]; ++j) s[j] = k_ids_[j0 + j] == q_ids_[i] ? s[j] : kNone;
  }

  double slope(int64_t head) const { return mask_.alibi ? static_cast<double>(mask_.alibi[head]) : 0.0; }

 private:
  AttentionMask mask_;
  int64_t batch_;
  const int32_t* q_ids_ = nullptr;
  const int32_t* k_ids_ = nullptr;
};

/// exp below this is 0: results next to the smallest normal number would cost a trap of the processor each.
template <class A> inline constexpr A kExpFloor = std::is_same_v<A, double> ? A(-700) : A(-87);

/// s = exp(s - shift) over n values, a multiple of the vector length; returns the sum per lane.
/// (flatten: an exp that is called instead of inlined is not vectorised.)
template <class A>
[[gnu::flatten, gnu::noinline]] Vec<A> exp_row(A* s, int64_t n, A shift) {
  Vec<A> sum{};
  for (int64_t j = 0; j < n; j += kLanes<A>) {
    A* x = s + j;
#pragma omp simd
    for (int l = 0; l < kLanes<A>; ++l) {
      const A y = x[l] - shift, p = vexp(y > kExpFloor<A> ? y : kExpFloor<A>);
      x[l] = y > kExpFloor<A> ? p : A{0};
    }
    sum += load(x);
  }
  return sum;
}

/// m of dropout for the keys of one tile row: 0 or 1. `call` numbers the first four keys.
template <class A>
[[gnu::flatten, gnu::noinline]] void keep_row(A* keep, const AttentionDropout& dropout, uint64_t call, uint64_t now) {
  alignas(64) uint32_t words[kTile];
  philox_words(words, dropout.key, call, kTile / 4, now);
  const uint32_t threshold = dropout.threshold;
#pragma omp simd
  for (int64_t c = 0; c < kTile; ++c) keep[c] = (words[c] >> 8) < threshold ? A{0} : A{1};
}

/// x *= factor keep over n values.
template <class A>
inline void multiply_row(A* x, const A* keep, int64_t n, A factor) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) x[j] *= factor * keep[j];
}

/// Scores to P = exp(scale s - lse), and dP to dS = P (dP - delta). Scores of -infinity give 0 for any lse.
template <class A>
[[gnu::flatten, gnu::noinline]] void softmax_gradient_row(A* s, A* ds, int64_t n, A scale, A lse, A delta) {
  for (int64_t j = 0; j < n; j += kLanes<A>) {
    A* x = s + j;
    A* y = ds + j;
#pragma omp simd
    for (int l = 0; l < kLanes<A>; ++l) {
      const A z = x[l] * scale - lse, p = vexp(z > kExpFloor<A> ? z : kExpFloor<A>);
      x[l] = z > kExpFloor<A> ? p : A{0};  // also where z is NaN: unseen keys of a row without keys
      y[l] = x[l] * (y[l] - delta);
    }
  }
}

/// sum_c x[c] y[c] in an order that is the same on every machine; the last values as in a product's sum over c, so that
/// few channels give what the product gives (the gradient of one key's score is then exactly 0).
template <class A, class T>
inline A dot_row(const T* x, const T* y, int64_t d) {
  constexpr int n = 64 / sizeof(A);
  A part[n] = {}, tail = 0;
  int64_t c = 0;
  for (; c + n <= d; c += n) {
#pragma omp simd
    for (int l = 0; l < n; ++l) part[l] += static_cast<A>(x[c + l]) * static_cast<A>(y[c + l]);
  }
  for (int w = n / 2; w > 0; w /= 2)
    for (int l = 0; l < w; ++l) part[l] += part[l + w];
  for (; c < d; ++c) {
    const A one = static_cast<A>(x[c]), other = static_cast<A>(y[c]);
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    tail = std::fma(one, other, tail);
#else
    tail += one * other;
#endif
  }
  return part[0] + tail;
}

}  // namespace krait::kernels::cpu

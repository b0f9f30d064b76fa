#pragma once
#include <cmath>
#include <vector>

#include "kernels/cpu/vector_math.h"
#include "kernels/kan.h"

namespace krait::kernels::cpu {

/// Rows of x whose bases are computed together, one per vector lane.
inline constexpr int64_t kKanRows = 64;

/// The knots of one input. t[-k] ... t[count - 1 + k] may be read: the row is continued on both sides, so that the
/// recurrence needs no limits. Bases that need such a knot do not exist and meet zero weights.
template <class A>
struct Knots {
  const A* t;
  int32_t count;
  bool uniform;    // to rounding: intervals are found by division
  A inverse_step;  // of a uniform row
};

template <class A>
class KnotRows {
 public:
  KnotRows(const Tensor& grid, int64_t order)
      : order_(order), count_(grid.size(1)), width_(count_ + 2 * order), knots_(static_cast<size_t>(grid.size(0) * width_)) {
    for (int64_t i = 0; i < grid.size(0); ++i) {
      const A* row = grid.data<A>() + i * count_;
      A* t = knots_.data() + i * width_ + order;
      std::copy(row, row + count_, t);
      const A step = (row[count_ - 1] - row[0]) / static_cast<A>(count_ - 1);
      const A beyond = step > 0 ? step : A(1);
      for (int64_t j = 1; j <= order; ++j) {
        t[-j] = row[0] - static_cast<A>(j) * beyond;
        t[count_ - 1 + j] = row[count_ - 1] + static_cast<A>(j) * beyond;
      }
      bool uniform = step > 0;
      const A allowed = (sizeof(A) == 4 ? A(1e-6) : A(1e-13)) * step;
      for (int64_t j = 0; j < count_; ++j)
        uniform = uniform && std::abs(row[j] - (row[0] + static_cast<A>(j) * step)) <= allowed;
      rows_.push_back({t, static_cast<int32_t>(count_), uniform, step > 0 ? A(1) / step : A(0)});
    }
  }
  const Knots<A>& operator[](int64_t i) const { return rows_[static_cast<size_t>(i)]; }

 private:
  int64_t order_, count_, width_;
  std::vector<A> knots_;
  std::vector<Knots<A>> rows_;
};

/// The interval of every lane: t[s] <= x < t[s+1]; the first or last outside the knots.
template <class A>
inline void find_intervals(int32_t* interval, const A* x, const Knots<A>& knots) {
  const A* t = knots.t;
  const int32_t last = knots.count - 2;
  if (knots.uniform) {
    const A first = t[0], inverse = knots.inverse_step, top = static_cast<A>(last);
#pragma omp simd
    for (int64_t b = 0; b < kKanRows; ++b) {
      A q = (x[b] - first) * inverse;
      q = q > 0 ? q : A(0);  // NaN too
      q = q < top ? q : top;
      int32_t s = static_cast<int32_t>(q);
      s -= x[b] < t[s] ? 1 : 0;  // the quotient may have been rounded over a knot
      s = s < 0 ? 0 : s;
      s += x[b] >= t[s + 1] ? 1 : 0;
      interval[b] = s > last ? last : s;
    }
    return;
  }
  int32_t half = 1;
  while (2 * half <= last) half *= 2;
  std::fill(interval, interval + kKanRows, 0);
  for (; half > 0; half /= 2) {
#pragma omp simd
    for (int64_t b = 0; b < kKanRows; ++b) {
      const int32_t next = interval[b] + half, at = next > last ? last : next;
      interval[b] = next <= last && x[b] >= t[at] ? next : interval[b];
    }
  }
}

/// The k+1 bases that may be non-zero: basis interval[b] - k + j has value[j kKanRows + b] and derivative slope[...]
/// (not computed when null). All are 0 outside the knots.
template <class A>
inline void local_bases(A* __restrict__ value, A* __restrict__ slope, int32_t* __restrict__ interval,
                        const A* __restrict__ x, const Knots<A>& knots, int64_t k) {
  constexpr int64_t R = kKanRows;
  find_intervals(interval, x, knots);
  const A* t = knots.t;
  alignas(64) A left[(kMaxSplineOrder + 1) * R], right[(kMaxSplineOrder + 1) * R], saved[R];
  const A inverse = knots.inverse_step;
  // Distances to the knots: left_j = x - t[s+1-j], right_j = t[s+j] - x, in steps when the row is uniform.
  if (knots.uniform) {
#pragma omp simd
    for (int64_t b = 0; b < R; ++b) saved[b] = (x[b] - t[interval[b]]) * inverse;
    for (int64_t j = 1; j <= k; ++j)
#pragma omp simd
      for (int64_t b = 0; b < R; ++b) {
        left[j * R + b] = saved[b] + static_cast<A>(j - 1);
        right[j * R + b] = static_cast<A>(j) - saved[b];
      }
  } else {
    for (int64_t j = 1; j <= k; ++j)
#pragma omp simd
      for (int64_t b = 0; b < R; ++b) {
        left[j * R + b] = x[b] - t[interval[b] + 1 - static_cast<int32_t>(j)];
        right[j * R + b] = t[interval[b] + static_cast<int32_t>(j)] - x[b];
      }
  }
  std::fill(value, value + R, A(1));
  if (slope) std::fill(slope, slope + R, A(0));
  for (int64_t p = 1; p <= k; ++p) {
    A* d = p == k ? slope : nullptr;
    const A k_scale = static_cast<A>(k) * (knots.uniform ? inverse : A(1)), inverse_p = A(1) / static_cast<A>(p);
    std::fill(saved, saved + R, A(0));
    for (int64_t r = 0; r < p; ++r) {
      const A *lp = left + (p - r) * R, *rp = right + (r + 1) * R;
      A* v = value + r * R;
      if (d) {
        // The recurrence's quotient is B_{j,k-1} over its support: what the derivative is made of.
#pragma omp simd
        for (int64_t b = 0; b < R; ++b) {
          const A quotient = knots.uniform ? v[b] * inverse_p : v[b] / (rp[b] + lp[b]);
          d[r * R + b] = (r == 0 ? A(0) : d[r * R + b]) - k_scale * quotient;
          d[(r + 1) * R + b] = k_scale * quotient;
          v[b] = saved[b] + rp[b] * quotient;
          saved[b] = lp[b] * quotient;
        }
      } else {
#pragma omp simd
        for (int64_t b = 0; b < R; ++b) {
          const A quotient = knots.uniform ? v[b] * inverse_p : v[b] / (rp[b] + lp[b]);
          v[b] = saved[b] + rp[b] * quotient;
          saved[b] = lp[b] * quotient;
        }
      }
    }
    std::copy(saved, saved + R, value + p * R);
  }
  const A first = t[0], end = t[knots.count - 1];
  for (int64_t j = 0; j <= k; ++j) {
#pragma omp simd
    for (int64_t b = 0; b < R; ++b) value[j * R + b] = x[b] >= first && x[b] < end ? value[j * R + b] : A(0);
    if (slope)
#pragma omp simd
      for (int64_t b = 0; b < R; ++b) slope[j * R + b] = x[b] >= first && x[b] < end ? slope[j * R + b] : A(0);
  }
}

/// Everything that the edges out of one input need of kKanRows values of it.
template <class A>
struct EdgeBasis {
  explicit EdgeBasis(int64_t order)
      : k(order), value(static_cast<size_t>((order + 1) * kKanRows)), slope(value.size()), x(kKanRows),
        silu(kKanRows), silu_slope(kKanRows), interval(kKanRows) {}

  /// Column i of x (rows, inputs) from row `first` on. Lanes past the last row repeat it.
  void compute(const A* from, int64_t rows, int64_t inputs, int64_t first, int64_t i, const Knots<A>& knots,
               bool derivatives) {
    for (int64_t b = 0; b < kKanRows; ++b) x[b] = from[std::min(first + b, rows - 1) * inputs + i];
    local_bases(value.data(), derivatives ? slope.data() : nullptr, interval.data(), x.data(), knots, k);
    A *s = silu.data(), *d = silu_slope.data();
    const A* v = x.data();
#pragma omp simd
    for (int64_t b = 0; b < kKanRows; ++b) s[b] = vsilu(v[b]);
    if (!derivatives) return;
#pragma omp simd
    for (int64_t b = 0; b < kKanRows; ++b) d[b] = vsilu_and_slope(v[b]).slope;
  }

  int64_t k;
  std::vector<A> value, slope, x, silu, silu_slope;
  std::vector<int32_t> interval;
};

}  // namespace krait::kernels::cpu

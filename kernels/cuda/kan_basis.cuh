#pragma once
#include "kernels/kan.h"

namespace krait::kernels::cuda {

/// The k+1 bases of one x that may be non-zero: basis `first` + j has value[j] and derivative slope[j]. Those whose
/// index is outside 0 ... G+k-1 do not exist. All 0 outside the knots.
/// K: the order where it is known at compile time (arrays stay in registers), else -1.
template <class A, int K>
struct LocalBasis {
  static constexpr int kMax = K >= 0 ? K : static_cast<int>(kMaxSplineOrder);
  static constexpr int kUnroll = K >= 0 ? kMaxSplineOrder : 1;  // a runtime order keeps its arrays in local memory
  A value[kMax + 1];
  A slope[kMax + 1];
  int first;

  /// t: `count` knots of the input, in shared or global memory. kSlope: derivatives too.
  template <bool kSlope>
  __device__ void compute(A x, const A* t, int count, int order) {
    const int k = K >= 0 ? K : order;
#pragma unroll kUnroll
    for (int j = 0; j <= kMax; ++j) value[j] = slope[j] = A(0);
    first = -k;
    if (!(x >= t[0] && x < t[count - 1])) return;
    const int s = interval(x, t, count);
    first = s - k;
    // Knots beyond the ends only enter bases that do not exist; a distance of 1 keeps those finite.
    const auto right = [&](int j) { return s + j < count ? t[s + j] - x : A(1); };
    const auto left = [&](int j) { return s + 1 - j >= 0 ? x - t[s + 1 - j] : A(1); };
    value[0] = A(1);
#pragma unroll kUnroll
    for (int p = 1; p <= kMax; ++p) {
      if (p > k) break;
      A saved = A(0);
#pragma unroll kUnroll
      for (int r = 0; r < p; ++r) {
        const A rr = right(r + 1), ll = left(p - r);
        const A quotient = value[r] / (rr + ll);  // B_{j,p-1} over its support
        if (kSlope && p == k) {
          slope[r] -= static_cast<A>(k) * quotient;
          slope[r + 1] = static_cast<A>(k) * quotient;
        }
        value[r] = saved + rr * quotient;
        saved = ll * quotient;
      }
      value[p] = saved;
    }
  }

 private:
  /// t[s] <= x < t[s+1]. A division finds it on uniform knots; otherwise the search goes on from both ends.
  __device__ static int interval(A x, const A* t, int count) {
    int low = 0, high = count - 1;  // t[low] <= x < t[high]
    const A guess = (x - t[0]) / (t[count - 1] - t[0]) * static_cast<A>(count - 1);
    const int s = min(max(static_cast<int>(guess), 0), count - 2);
    // One step to either side corrects rounding; what is left for uneven knots is bisection.
    const int a = max(s - 1, 0), b = min(s + 2, count - 1);
    if (x >= t[a]) low = a; else high = a;
    if (x < t[b]) high = min(high, b); else low = max(low, b);
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (x >= t[middle]) low = middle; else high = middle;
    }
    return low;
  }
};

template <class A>
__device__ A silu_value(A x) {
  const A c = x < A(-80) ? A(-80) : x;
  return c / (A(1) + ::exp(-c));
}
template <class A>
__device__ A silu_slope(A x) {
  const A c = x < A(-80) ? A(-80) : x > A(80) ? A(80) : x;
  const A gate = A(1) / (A(1) + ::exp(-c));
  return gate * (A(1) + c * (A(1) - gate));
}

}  // namespace krait::kernels::cuda

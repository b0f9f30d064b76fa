#include "kernels/reduce.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "core/parallel.h"
#include "kernels/cpu/vector_math.h"

namespace krait::kernels::cpu {

namespace {

// A reduction over (o, r, i) is cut into pieces whose sizes depend on the shape alone; each piece gives a partial
// result, and partial results are combined in order. So the value does not depend on the number of threads.
constexpr int64_t kLanes = 64;
constexpr int64_t kColumns = 512;  // width of a strip when i > 1

template <class A>
struct Sum {
  static constexpr A start = A(0);
  static A take(A s, A x, A) { return s + x; }
  static A join(A s, A t) { return s + t; }
};
template <class A>
struct SumExp {
  static constexpr A start = A(0);
  static A take(A s, A x, A shift) { return s + vexp(x - shift); }
  static A join(A s, A t) { return s + t; }
};
template <class A>
struct Max {
  static constexpr A start = -std::numeric_limits<A>::infinity();
  static A take(A s, A x, A) { return s > x || s != s ? s : x; }  // a NaN in x is taken, one in s stays
  static A join(A s, A t) { return take(s, t, A(0)); }
};
template <class A>
struct Min {
  static constexpr A start = std::numeric_limits<A>::infinity();
  static A take(A s, A x, A) { return s < x || s != s ? s : x; }
  static A join(A s, A t) { return take(s, t, A(0)); }
};

template <class R, class T, class A>
A reduce_run(const T* x, int64_t n, A shift) {
  alignas(64) A lane[kLanes];
  std::fill(lane, lane + kLanes, R::start);
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) lane[l] = R::take(lane[l], static_cast<A>(x[k + l]), shift);
  }
  for (int64_t l = 0; k + l < n; ++l) lane[l] = R::take(lane[l], static_cast<A>(x[k + l]), shift);
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lane[l] = R::join(lane[l], lane[l + half]);
  return lane[0];
}

// out[c] over rows [0, rows) of a strip `width` wide.
template <class R, class T, class A>
void reduce_strip(A* out, const T* x, int64_t rows, int64_t stride, int64_t width, const A* shift) {
  std::fill(out, out + width, R::start);
  for (int64_t k = 0; k < rows; ++k) {
    const T* const row = x + k * stride;
    if (shift) {
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) out[c] = R::take(out[c], static_cast<A>(row[c]), shift[c]);
    } else {
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) out[c] = R::take(out[c], static_cast<A>(row[c]), A(0));
    }
  }
}

template <class R, class A, class T, class Y>
void reduce(Y* y, const T* x, const A* shift, int64_t o, int64_t r, int64_t i, A scale) {
  const int64_t strips = i == 1 ? 1 : (i + kColumns - 1) / kColumns;
  const int64_t piece = i == 1 ? 16384 : std::max<int64_t>(64, 65536 / std::min(i, kColumns));
  const int64_t pieces = (r + piece - 1) / piece;
  std::vector<A> partial(static_cast<size_t>(o * pieces * i));
  const int64_t work = std::max<int64_t>(1, std::min(r, piece) * std::min(i, kColumns));
  parallel_for(0, o * pieces * strips, std::max<int64_t>(1, 32768 / work), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const int64_t strip = t % strips, part = t / strips % pieces, at = t / strips / pieces;
      const int64_t k0 = part * piece, rows = std::min(piece, r - k0), c0 = strip * kColumns;
      A* const out = partial.data() + (at * pieces + part) * i + c0;
      const T* const from = x + (at * r + k0) * i + c0;
      if (i == 1)
        *out = reduce_run<R>(from, rows, shift ? shift[at] : A(0));
      else
        reduce_strip<R>(out, from, rows, i, std::min(kColumns, i - c0), shift ? shift + at * i + c0 : nullptr);
    }
  });
  for (int64_t at = 0; at < o; ++at)
    for (int64_t c = 0; c < i; ++c) {
      const A* const p = partial.data() + at * pieces * i + c;
      A s = p[0];
      for (int64_t k = 1; k < pieces; ++k) s = R::join(s, p[k * i]);
      y[at * i + c] = static_cast<Y>(s * scale);
    }
}

template <template <class> class R>
void reduce_as(Tensor& y, const Tensor& x, double scale) {
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    reduce<R<A>, A>(y.data<T>(), x.data<T>(), static_cast<const A*>(nullptr), x.size(0), x.size(1), x.size(2),
                    static_cast<A>(scale));
  });
}

}  // namespace

void sum(Tensor& y, const Tensor& x, double scale) { reduce_as<Sum>(y, x, scale); }
void amax(Tensor& y, const Tensor& x) { reduce_as<Max>(y, x, 1.0); }
void amin(Tensor& y, const Tensor& x) { reduce_as<Min>(y, x, 1.0); }

void sum_exp(Tensor& y, const Tensor& x, const Tensor& shift) {
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    reduce<SumExp<A>, A>(y.data<A>(), x.data<T>(), shift.data<A>(), x.size(0), x.size(1), x.size(2), A(1));
  });
}

void argmax(Tensor& y, const Tensor& x) {
  const int64_t r = x.size(1);
  int64_t* const out = y.data<int64_t>();
  visit_float(x.dtype(), [&]<class T>() {
    const T* const in = x.data<T>();
    parallel_for(0, x.size(0), std::max<int64_t>(1, 16384 / r), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const T* const v = in + row * r;
        const accum_t<T> highest = reduce_run<Max<accum_t<T>>>(v, r, accum_t<T>(0));
        int64_t k = 0;  // a NaN is the maximum where there is one
        if (highest == highest)
          while (static_cast<accum_t<T>>(v[k]) != highest) ++k;
        else
          while (static_cast<accum_t<T>>(v[k]) == static_cast<accum_t<T>>(v[k])) ++k;
        out[row] = k;
      }
    });
  });
}

}  // namespace krait::kernels::cpu

#include "kernels/causal_conv1d.h"

#include <algorithm>
#include <memory>

#include "core/parallel.h"
#include "kernels/cpu/put.h"
#include "kernels/cpu/vector_math.h"

// Rows are walked in their order in memory, since a step to the next row is a step to another page. With four taps, four
// positions go together, in blocks of channels that stay in the first cache and in passes that each fit into the
// registers: p, then SiLU or its gradient, then sums and dx. (One pass over all of it spills half of its values: twice the
// time with AVX2.) Everything else (other widths, starts of documents, the ends) goes position by position, with taps in
// fours, the last ones padded with a row of zeros.
namespace krait::kernels::cpu {

namespace {

constexpr int64_t kBlock = 512, kRows = 32, kGrain = 16384, kTile = 4;

template <class A, class B>
void add_taps(A* __restrict p, const B* __restrict s0, const B* __restrict s1, const B* __restrict s2,
              const B* __restrict s3, const A* __restrict w0, const A* __restrict w1, const A* __restrict w2,
              const A* __restrict w3, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    p[i] += (w0[i] * static_cast<A>(s0[i]) + w1[i] * static_cast<A>(s1[i])) +
            (w2[i] * static_cast<A>(s2[i]) + w3[i] * static_cast<A>(s3[i]));
}

template <class A, class B>
void add_row(A* __restrict p, const B* __restrict s, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) p[i] += static_cast<A>(s[i]);
}

template <class A, class B>
void add_product(A* __restrict p, const A* __restrict g, const B* __restrict s, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) p[i] += g[i] * static_cast<A>(s[i]);
}

template <class T, class A>
void put_row(T* __restrict to, const A* __restrict p, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) put(to[i], p[i]);
}

template <class T, class A>
void put_silu(T* __restrict to, const A* __restrict p, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) put(to[i], vsilu(p[i]));
}

// g = dy silu'(p), into p.
template <class T, class A>
void silu_gradient(A* __restrict p, const T* __restrict dy, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<A>(dy[i]) * vsilu_and_slope(p[i]).slope;
}

// Where the rows of one batch row are, and which of them a position sees.
template <class T>
struct Sequence {
  const T *x, *initial;     // initial may be null
  const int32_t* segments;  // may be null
  int64_t l, c, k, stride;

  bool together(int64_t s, int64_t t) const {
    return segments == nullptr || segments[std::max<int64_t>(s, 0)] == segments[t];
  }
  // Input s as position t sees it: null where that counts as 0.
  const T* input(int64_t s, int64_t t) const {
    if (!together(s, t)) return nullptr;
    if (s >= 0) return x + s * stride;
    return initial == nullptr ? nullptr : initial + (s + k - 1) * c;
  }
  // Whether positions [t, t + kTile) can go together: they see all of their inputs, and those are in x.
  bool tile(int64_t t) const { return k == 4 && t >= 3 && t + kTile <= l && together(t - 3, t + kTile - 1); }
};

// Weights as (taps, c), taps rounded up to four with zeros.
template <class A>
struct Taps {
  Taps(const Tensor& weight) : k(weight.size(1)), c(weight.size(0)), padded((k + 3) / 4 * 4) {
    rows = zeros({padded, c}, dtype_of<A>, kCpu);
    const A* w = weight.data<A>();
    A* to = rows.data<A>();
    for (int64_t i = 0; i < c; ++i)
      for (int64_t j = 0; j < k; ++j) to[j * c + i] = w[i * k + j];
  }
  // p += sum_j w[j] source(j) over n channels from `at`.
  template <class B, class F>
  void add(A* p, const B* zero, int64_t at, int64_t n, F source) const {
    const A* w = rows.data<A>() + at;
    for (int64_t j = 0; j < padded; j += 4) {
      const B* s[4];
      for (int64_t i = 0; i < 4; ++i) {
        s[i] = j + i < k ? source(j + i) : nullptr;
        if (s[i] == nullptr) s[i] = zero;
      }
      add_taps(p, s[0], s[1], s[2], s[3], w + j * c, w + (j + 1) * c, w + (j + 2) * c, w + (j + 3) * c, n);
    }
  }
  int64_t k, c, padded;
  Tensor rows;
};

template <class T>
Sequence<T> sequence_of(const CausalConv1dInputs& in, int64_t row) {
  const int64_t l = in.x.size(1), c = in.x.size(2), k = in.weight.size(1);
  return {in.x.data<T>() + row * in.x.stride(0),
          in.initial.defined() && k > 1 ? in.initial.data<T>() + row * (k - 1) * c : nullptr,
          in.segments.defined() ? in.segments.data<int32_t>() + row * l : nullptr,
          l, c, k, in.x.stride(1)};
}

// p of position t, channels [at, at + n).
template <class T, class A>
void filter_row(A* p, const Sequence<T>& in, const Taps<A>& taps, const A* bias, const T* zero, int64_t t, int64_t at,
                int64_t n) {
  std::copy(bias + at, bias + at + n, p);
  taps.add(p, zero, at, n, [&](int64_t j) -> const T* {
    const T* row = in.input(t - in.k + 1 + j, t);
    return row == nullptr ? nullptr : row + at;
  });
}

// p of four positions, n channels, rows kBlock apart; x is the row three before the first.
template <class T, class A>
void filter_tile(A* __restrict p, const T* __restrict x, int64_t x_row, const A* __restrict w, const A* __restrict bias,
                 int64_t c, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A w0 = w[i], w1 = w[c + i], w2 = w[2 * c + i], w3 = w[3 * c + i], from = bias[i];
    A a[kTile + 3];
#pragma GCC unroll 8
    for (int r = 0; r < kTile + 3; ++r) a[r] = static_cast<A>(x[r * x_row + i]);
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r)
      p[r * kBlock + i] = from + ((w0 * a[r] + w1 * a[r + 1]) + (w2 * a[r + 2] + w3 * a[r + 3]));
  }
}

// y of four positions.
template <class T, class A>
void forward_tile(T* y, int64_t y_row, const T* x, int64_t x_row, const A* w, const A* bias, int64_t c, bool silu) {
  alignas(64) A p[kTile * kBlock];
  for (int64_t at = 0; at < c; at += kBlock) {
    const int64_t n = std::min(kBlock, c - at);
    filter_tile(p, x + at, x_row, w + at, bias + at, c, n);
    for (int64_t r = 0; r < kTile; ++r)
      silu ? put_silu(y + r * y_row + at, p + r * kBlock, n) : put_row(y + r * y_row + at, p + r * kBlock, n);
  }
}

// g = dy silu'(p), or dy where p is null.
template <class T, class A>
void gradient_row(A* __restrict g, const T* __restrict dy, const A* __restrict p, int64_t n) {
  if (p == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) g[i] = static_cast<A>(dy[i]);
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) g[i] = static_cast<A>(dy[i]) * vsilu_and_slope(p[i]).slope;
}

// Sums of four positions: 4 rows of dweight, one of dbias. x is the row three before the first.
template <class T, class A>
void add_tile_sums(A* __restrict sums, int64_t c, const A* __restrict g0, const A* __restrict g1, const A* __restrict g2,
                   const A* __restrict g3, const T* __restrict x, int64_t x_row, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A d[kTile] = {g0[i], g1[i], g2[i], g3[i]};
    A a[kTile + 3];
#pragma GCC unroll 8
    for (int r = 0; r < kTile + 3; ++r) a[r] = static_cast<A>(x[r * x_row + i]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j * c + i] += (d[0] * a[j] + d[1] * a[j + 1]) + (d[2] * a[j + 2] + d[3] * a[j + 3]);
    sums[4 * c + i] += (d[0] + d[1]) + (d[2] + d[3]);
  }
}

// dx of four positions from g of them and of the three behind.
template <class T, class A>
void input_gradient_tile(T* __restrict dx, int64_t dx_row, A* const (&g)[kTile + 3], int64_t at, const A* __restrict w,
                         int64_t c, int64_t n) {
  const A *g0 = g[0] + at, *g1 = g[1] + at, *g2 = g[2] + at, *g3 = g[3] + at, *g4 = g[4] + at, *g5 = g[5] + at, *g6 = g[6] + at;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A w0 = w[i], w1 = w[c + i], w2 = w[2 * c + i], w3 = w[3 * c + i];
    const A d[kTile + 3] = {g0[i], g1[i], g2[i], g3[i], g4[i], g5[i], g6[i]};
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r)
      put(dx[r * dx_row + i], (w0 * d[r + 3] + w1 * d[r + 2]) + (w2 * d[r + 1] + w3 * d[r]));
  }
}

// Positions t .. t + 3: sums +=, dx of positions t - 3 .. t, and g of all four, the last three of which come again.
// x and dx point to position t - 3, dy to t, g to those of t - 3 .. t + 3.
template <class T, class A>
void backward_tile(T* dx, int64_t dx_row, A* sums, A* const (&g)[kTile + 3], const T* dy, int64_t dy_row, const T* x,
                   int64_t x_row, const A* w, const A* bias, int64_t c, bool silu) {
  alignas(64) A p[kTile * kBlock];
  for (int64_t at = 0; at < c; at += kBlock) {
    const int64_t n = std::min(kBlock, c - at);
    if (silu) filter_tile(p, x + at, x_row, w + at, bias + at, c, n);
    for (int64_t r = 0; r < kTile; ++r) gradient_row(g[r + 3] + at, dy + r * dy_row + at, silu ? p + r * kBlock : nullptr, n);
    add_tile_sums(sums + at, c, g[3] + at, g[4] + at, g[5] + at, g[6] + at, x + at, x_row, n);
    input_gradient_tile(dx + at, dx_row, g, at, w + at, c, n);
  }
}

}  // namespace

void causal_conv1d_forward(Tensor& y_out, Tensor& final_out, const CausalConv1dInputs& in) {
  const int64_t b = in.x.size(0), l = in.x.size(1), c = in.x.size(2), k = in.weight.size(1);
  visit_float(in.x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Taps<A> taps(in.weight);
    const Tensor bias_row = in.bias.defined() ? in.bias : zeros({c}, dtype_of<A>, kCpu);
    const A *bias = bias_row.data<A>(), *w = taps.rows.template data<A>();
    T *y_all = y_out.data<T>(), *final_all = final_out.numel() > 0 ? final_out.data<T>() : nullptr;
    const T zero[kBlock] = {};
    parallel_for(0, b * l, std::max<int64_t>(1, kGrain / (c * taps.padded)), [&](int64_t first, int64_t last) {
      A p[kBlock];
      for (int64_t i = first; i < last;) {
        const Sequence<T> s = sequence_of<T>(in, i / l);
        const int64_t t = i % l;
        if (i + kTile <= last && s.tile(t)) {
          const T* x = s.x + (t - 3) * s.stride;
          forward_tile(y_all + i * c, c, x, s.stride, w, bias, c, in.silu);
          i += kTile;
          continue;
        }
        for (int64_t at = 0; at < c; at += kBlock) {
          const int64_t n = std::min(kBlock, c - at);
          filter_row(p, s, taps, bias, zero, t, at, n);
          if (in.silu)
            put_silu(y_all + i * c + at, p, n);
          else
            put_row(y_all + i * c + at, p, n);
        }
        ++i;
      }
    });
    for (int64_t row = 0; row < b; ++row) {
      const Sequence<T> s = sequence_of<T>(in, row);
      for (int64_t i = 0; i < k - 1; ++i) {
        T* to = final_all + (row * (k - 1) + i) * c;
        const T* from = s.input(l - k + 1 + i, l - 1);
        if (from == nullptr)
          std::fill(to, to + c, T(0));
        else
          std::copy(from, from + c, to);
      }
    }
  });
}

namespace {

// The backward over positions [begin, end) of one sequence.
template <class T, class A>
struct BackwardPiece {
  const Sequence<T>& s;
  const Taps<A>& taps;
  const A* bias;
  const T *dy, *dfinal;  // dfinal may be null
  int64_t dy_row, begin, end;
  T *dx, *dinitial;
  int64_t dx_row;
  A *sums, *ring;  // g of the last `slots` positions
  int64_t slots;
  bool silu;
  const T* zero;
  const A* no_gradient;

  static int64_t slots_for(int64_t k) { return k + kTile; }
  A* g(int64_t t) const { return ring + (t - begin) % slots * s.c; }

  void run() const {
    const int64_t k = s.k, seen = std::min(s.l, end + k - 1);
    int64_t next = begin == 0 && s.initial != nullptr ? 1 - k : begin;  // whose dx comes next
    for (int64_t t = begin; t < seen;) {
      if (next >= 0 && next == t - 3 && t + kTile <= end && s.tile(t)) {
        A* const rows[kTile + 3] = {g(t - 3), g(t - 2), g(t - 1), g(t), g(t + 1), g(t + 2), g(t + 3)};
        backward_tile(dx + next * dx_row, dx_row, sums, rows, dy + t * dy_row, dy_row, s.x + next * s.stride, s.stride,
                      taps.rows.template data<A>(), bias, s.c, silu);
        t += kTile;
        next += kTile;
        continue;
      }
      position(t);
      ++t;
      for (; next + k - 1 < t && next < end; ++next) input_gradient(next, seen);
    }
    for (; next < end; ++next) input_gradient(next, seen);
  }

  void position(int64_t t) const {
    for (int64_t at = 0; at < s.c; at += kBlock) {
      const int64_t n = std::min(kBlock, s.c - at);
      A* gt = g(t) + at;
      if (silu) {
        filter_row(gt, s, taps, bias, zero, t, at, n);
        silu_gradient(gt, dy + t * dy_row + at, n);
      } else {
        std::fill(gt, gt + n, A(0));
        add_row(gt, dy + t * dy_row + at, n);
      }
      if (t >= end) continue;
      for (int64_t j = 0; j < s.k; ++j)
        if (const T* x = s.input(t - s.k + 1 + j, t)) add_product(sums + j * s.c + at, gt, x + at, n);
      add_row(sums + s.k * s.c + at, gt, n);
    }
  }

  void input_gradient(int64_t i, int64_t seen) const {
    const int64_t k = s.k, kept = i - (s.l - k + 1);  // its place in the final state
    A d[kBlock];
    for (int64_t at = 0; at < s.c; at += kBlock) {
      const int64_t n = std::min(kBlock, s.c - at);
      std::fill(d, d + n, A(0));
      taps.add(d, no_gradient, at, n, [&](int64_t j) -> const A* {
        const int64_t t = i + k - 1 - j;
        return t >= begin && t < seen && s.together(i, t) ? g(t) + at : nullptr;
      });
      if (dfinal != nullptr && kept >= 0 && s.together(i, s.l - 1)) add_row(d, dfinal + kept * s.c + at, n);
      put_row(i >= 0 ? dx + i * dx_row + at : dinitial + (i + k - 1) * s.c + at, d, n);
    }
  }
};

}  // namespace

void causal_conv1d_backward(Tensor& dx_out, Tensor& dinitial_out, Tensor& dweight_out, bool add_dweight,
                            Tensor& dbias_out, bool add_dbias, const Tensor& dy_in, const Tensor& dfinal_in,
                            const CausalConv1dInputs& in) {
  const int64_t b = in.x.size(0), l = in.x.size(1), c = in.x.size(2), k = in.weight.size(1);
  // Chunks follow from the shape alone, so that dweight and dbias do not depend on the number of threads.
  const int64_t chunk = std::max({kRows, 4 * k, (b * l + 63) / 64}), chunks = (l + chunk - 1) / chunk;
  visit_float(in.x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Taps<A> taps(in.weight);
    const Tensor bias_row = in.bias.defined() ? in.bias : zeros({c}, dtype_of<A>, kCpu);
    const Tensor partial = zeros({b * chunks, k + 1, c}, dtype_of<A>, kCpu);  // k rows of dweight, one of dbias
    A* partial_all = partial.data<A>();
    const T zero[kBlock] = {};
    const A no_gradient[kBlock] = {};
    const int64_t slots = BackwardPiece<T, A>::slots_for(k);
    parallel_for(0, b * chunks, std::max<int64_t>(1, kGrain / (std::min(chunk, l) * c * taps.padded)), [&](int64_t first, int64_t last) {
      const std::unique_ptr<A[]> ring(new A[static_cast<size_t>(slots * c)]);
      for (int64_t item = first; item < last; ++item) {
        const int64_t row = item / chunks, piece = item % chunks;
        const Sequence<T> s = sequence_of<T>(in, row);
        const bool keeps = k > 1;
        BackwardPiece<T, A>{
            .s = s, .taps = taps, .bias = bias_row.data<A>(), .dy = dy_in.data<T>() + row * dy_in.stride(0),
            .dfinal = dfinal_in.defined() && keeps ? dfinal_in.data<T>() + row * (k - 1) * c : nullptr,
            .dy_row = dy_in.stride(1), .begin = piece * chunk, .end = std::min(l, (piece + 1) * chunk),
            .dx = dx_out.data<T>() + row * dx_out.stride(0),
            .dinitial = dinitial_out.defined() && keeps ? dinitial_out.data<T>() + row * (k - 1) * c : nullptr,
            .dx_row = dx_out.stride(1), .sums = partial_all + item * (k + 1) * c, .ring = ring.get(), .slots = slots,
            .silu = in.silu, .zero = zero, .no_gradient = no_gradient}
            .run();
      }
    });
    A *dweight = dweight_out.data<A>(), *dbias = dbias_out.defined() ? dbias_out.data<A>() : nullptr;
    parallel_for(0, c, std::max<int64_t>(1, kGrain / ((k + 1) * b * chunks)), [&](int64_t first, int64_t last) {
      const int64_t n = last - first;
      for (int64_t i = 1; i < b * chunks; ++i)
        for (int64_t j = 0; j <= k; ++j) add_row(partial_all + j * c + first, partial_all + (i * (k + 1) + j) * c + first, n);
      for (int64_t i = first; i < last; ++i)
        for (int64_t j = 0; j < k; ++j)
          dweight[i * k + j] = (add_dweight ? dweight[i * k + j] : A(0)) + partial_all[j * c + i];
      for (int64_t i = first; dbias != nullptr && i < last; ++i)
        dbias[i] = (add_dbias ? dbias[i] : A(0)) + partial_all[k * c + i];
    });
  });
}

}  // namespace krait::kernels::cpu

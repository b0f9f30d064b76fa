#include "kernels/causal_conv1d.h"

#include <algorithm>
#include <memory>

#include "core/parallel.h"
#include "kernels/cpu/put.h"
#include "kernels/cpu/vector_silu.h"

// Rows are walked in their order in memory, since a step to the next row is a step to another page; blocks of channels
// keep more in the first cache and still lose a fifth to the processor's prefetching, which follows whole rows. With four
// taps, four positions go together, written in vectors, so that one pass keeps what it needs in registers (from the same
// loop over channels GCC makes code that takes 1.4 times as long). SiLU's exponential and division are most of the work: the
// plain filter runs at the speed of a copy. Everything else (other widths, starts of documents, the ends, channels beyond
// whole vectors) goes position by position, with taps in fours, the last ones padded with a row of zeros, and the same
// operations in the same order: a position's result does not tell whether it went in four.
namespace krait::kernels::cpu {

namespace {

constexpr int64_t kBlock = 512, kRows = 32, kGrain = 16384, kTile = 4;

template <class A, class B>
void add_taps(A* __restrict p, const B* __restrict s0, const B* __restrict s1, const B* __restrict s2,
              const B* __restrict s3, const A* __restrict w0, const A* __restrict w1, const A* __restrict w2,
              const A* __restrict w3, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const A low = w1[i] * static_cast<A>(s1[i]) + (w0[i] * static_cast<A>(s0[i]) + p[i]);
    p[i] = w3[i] * static_cast<A>(s3[i]) + (w2[i] * static_cast<A>(s2[i]) + low);
  }
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

template <class A, class B>
void multiply_row(A* __restrict p, const B* __restrict s, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) p[i] *= static_cast<A>(s[i]);
}

template <class T, class A>
void put_row(T* __restrict to, const A* __restrict p, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) put(to[i], p[i]);
}

// f of n values in place by vectors, as a tile makes them.
template <class A, class F>
void map_vectors(A* p, int64_t n, F f) {
  const auto one = [&](A* at) __attribute__((always_inline)) {
    Vec<A> v[1] = {load(at)};
    f(v);
    store(at, v[0]);
  };
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) one(p + i);
  if (i == n) return;
  A rest[kLanes<A>] = {};
  std::copy(p + i, p + n, rest);
  one(rest);
  std::copy(rest, rest + (n - i), p + i);
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

// From one row of what a pass keeps for itself (weights, sums, gradients of positions) to the next: 64 bytes more than
// the channels need, rounded up, since rows a multiple of 2 or 4 KiB apart share few sets of the first cache, and those
// of x, dy and dx fill them already.
int64_t own_row(int64_t c) { return round_up(c, 16) + 16; }

// Weights as (taps, c), taps rounded up to four with zeros; rows `row` apart.
template <class A>
struct Taps {
  Taps(const Tensor& weight) : k(weight.size(1)), c(weight.size(0)), row(own_row(c)), padded((k + 3) / 4 * 4) {
    rows = zeros({padded, row}, dtype_of<A>, kCpu);
    const A* w = weight.data<A>();
    A* to = rows.data<A>();
    for (int64_t i = 0; i < c; ++i)
      for (int64_t j = 0; j < k; ++j) to[j * row + i] = w[i * k + j];
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
      add_taps(p, s[0], s[1], s[2], s[3], w + j * row, w + (j + 1) * row, w + (j + 2) * row, w + (j + 3) * row, n);
    }
  }
  int64_t k, c, row, padded;
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

// What a tile keeps of each vector of channels lies side by side, so that few pointers reach all of it and it falls into all
// sets of the first cache alike: four taps and the bias, five sums, g of the last three positions.
constexpr int64_t kTapVectors = 5, kSumVectors = 5, kLastVectors = kTile - 1;

// Taps and bias so, of the channels that fill whole vectors.
template <class A>
Tensor tile_taps(const Tensor& weight, const A* bias) {
  const int64_t c = weight.size(0) / kLanes<A> * kLanes<A>;
  if (weight.size(1) != 4) return {};  // no tiles
  const Tensor packed = empty({c, kTapVectors}, dtype_of<A>, kCpu);
  const A* w = weight.data<A>();
  A* to = packed.data<A>();
  for (int64_t i = 0; i < c; i += kLanes<A>, to += kTapVectors * kLanes<A>)
    for (int64_t n = 0; n < kLanes<A>; ++n) {
      for (int64_t j = 0; j < 4; ++j) to[j * kLanes<A> + n] = w[(i + n) * 4 + j];
      to[4 * kLanes<A> + n] = bias[i + n];
    }
  return packed;
}

// p of four positions before SiLU, one vector of channels, in the order of add_taps: weights and the window over x stay in
// registers. x is the row three before the first.
template <class A, class T>
[[gnu::always_inline]] inline void filter_tile(Vec<A> (&p)[kTile], const T* x, int64_t x_row, const A* taps) {
  Vec<A> a0 = widened<A>(x), a1 = widened<A>(x + x_row), a2 = widened<A>(x + 2 * x_row);
  Vec<A> w[kTapVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kTapVectors; ++j) {
    w[j] = load(taps + j * kLanes<A>);
    keep(w[j]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kTile; ++r) {
    Vec<A> a3 = widened<A>(x + (r + 3) * x_row);
    keep(a3);
    const Vec<A> low = w[1] * a1 + (w[0] * a0 + w[4]);
    p[r] = w[3] * a3 + (w[2] * a2 + low);
    a0 = a1;
    a1 = a2;
    a2 = a3;
  }
}

// y of four positions, n channels in whole vectors; x is the row three before the first.
template <bool Silu, class T, class A>
void forward_tile(T* __restrict y, int64_t y_row, const T* __restrict x, int64_t x_row, const A* __restrict taps, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<A>, taps += kTapVectors * kLanes<A>) {
    Vec<A> p[kTile] = {};
    filter_tile(p, x + i, x_row, taps);
    if constexpr (Silu) vector_silu(p);
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) put_vector<A>(y + r * y_row + i, p[r]);
  }
}

// Positions t .. t + 3, n channels in whole vectors: sums += (4 rows of dweight, one of dbias), dx of positions t - 3 .. t;
// `latest` holds g of the three positions before t, and then of the last three. x and dx point to position t - 3, dy to t.
template <bool Silu, class T, class A>
void backward_tile(T* __restrict dx, int64_t dx_row, A* __restrict sums, A* __restrict latest, const T* __restrict dy,
                   int64_t dy_row, const T* __restrict x, int64_t x_row, const A* __restrict taps, int64_t n) {
  constexpr int64_t v = kLanes<A>;
  for (int64_t i = 0; i < n; i += v, sums += kSumVectors * v, latest += kLastVectors * v, taps += kTapVectors * v) {
    Vec<A> d[kTile] = {};
    if constexpr (Silu) {
      filter_tile(d, x + i, x_row, taps);
#pragma GCC unroll 2
      for (int r = 0; r < kTile; r += 2) {  // two at once: four need more registers than there are
        Vec<A> two[2] = {d[r], d[r + 1]};
        vector_silu_slope(two);
        d[r] = two[0];
        d[r + 1] = two[1];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) {
      const Vec<A> up = widened<A>(dy + r * dy_row + i);
      d[r] = Silu ? d[r] * up : up;
    }
    Vec<A> dw[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) dw[j] = load(sums + j * v);
#pragma GCC unroll 8
    for (int r = 0; r < kTile + 3; ++r) {
      Vec<A> a = widened<A>(x + r * x_row + i);
      keep(a);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        if (r - j >= 0 && r - j < kTile) dw[j] += d[r - j] * a;
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store(sums + j * v, dw[j]);
    store(sums + 4 * v, load(sums + 4 * v) + ((d[0] + d[1]) + (d[2] + d[3])));
    const Vec<A> all[kTile + 3] = {load(latest), load(latest + v), load(latest + 2 * v), d[0], d[1], d[2], d[3]};
#pragma GCC unroll 4
    for (int r = 1; r < kTile; ++r) store(latest + (r - 1) * v, d[r]);
    Vec<A> w[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      w[j] = load(taps + j * v);
      keep(w[j]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) {
      const Vec<A> low = w[1] * all[r + 2] + w[0] * all[r + 3];
      put_vector<A>(dx + r * dx_row + i, w[3] * all[r] + (w[2] * all[r + 1] + low));
    }
  }
}

}  // namespace

void causal_conv1d_forward(Tensor& y_out, Tensor& final_out, const CausalConv1dInputs& in) {
  const int64_t b = in.x.size(0), l = in.x.size(1), c = in.x.size(2), k = in.weight.size(1);
  visit_float(in.x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Taps<A> taps(in.weight);
    const Tensor bias_row = in.bias.defined() ? in.bias : zeros({c}, dtype_of<A>, kCpu);
    const A* bias = bias_row.data<A>();
    const Tensor packed = tile_taps(in.weight, bias);
    T *y_all = y_out.data<T>(), *final_all = final_out.numel() > 0 ? final_out.data<T>() : nullptr;
    const T zero[kBlock] = {};
    const int64_t whole = c / kLanes<A> * kLanes<A>;
    parallel_for(0, b * l, std::max<int64_t>(1, kGrain / (c * taps.padded)), [&](int64_t first, int64_t last) {
      A p[kBlock];
      const auto position = [&](const Sequence<T>& s, int64_t i, int64_t channel) {  // channels from there on
        for (int64_t at = channel; at < c; at += kBlock) {
          const int64_t n = std::min(kBlock, c - at);
          filter_row(p, s, taps, bias, zero, i % l, at, n);
          if (in.silu) map_vectors(p, n, [](Vec<A> (&v)[1]) __attribute__((always_inline)) { vector_silu(v); });
          put_row(y_all + i * c + at, p, n);
        }
      };
      for (int64_t i = first; i < last;) {
        const Sequence<T> s = sequence_of<T>(in, i / l);
        const int64_t t = i % l;
        const bool tile = i + kTile <= last && s.tile(t);
        if (tile)
          (in.silu ? forward_tile<true, T, A> : forward_tile<false, T, A>)(y_all + i * c, c, s.x + (t - 3) * s.stride, s.stride,
                                                                           packed.data<A>(), whole);
        for (const int64_t end = i + (tile ? kTile : 1); i < end; ++i) position(s, i, tile ? whole : 0);
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

// f(packed, row) for the places of n channels, in whole vectors, in a row and as vector j among `of` of what a tile keeps.
template <class A, class F>
void each_place(A* packed, int64_t of, int64_t j, A* row, int64_t n, F f) {
  for (int64_t i = 0; i < n; i += kLanes<A>) f(packed + i * of + j * kLanes<A>, row + i);
}

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
  const A* tile_taps;  // null without tiles
  A *tile_sums, *latest;
  bool silu;
  const T* zero;
  const A* no_gradient;

  static int64_t slots_for(int64_t k) { return k + kTile; }
  A* g(int64_t t) const { return ring + (t - begin) % slots * taps.row; }

  void run() const {
    const int64_t k = s.k, seen = std::min(s.l, end + k - 1), whole = s.c / kLanes<A> * kLanes<A>;
    int64_t next = begin == 0 && s.initial != nullptr ? 1 - k : begin;  // whose dx comes next
    for (int64_t t = begin; t < seen;) {
      if (next >= 0 && next == t - 3 && t + kTile <= end && s.tile(t)) {
        for (int64_t j = 0; j < kLastVectors; ++j) each_place(latest, kLastVectors, j, g(next + j), whole, [](A* to, const A* from) { store(to, load(from)); });
        do {
          (silu ? backward_tile<true, T, A> : backward_tile<false, T, A>)(
              dx + next * dx_row, dx_row, tile_sums, latest, dy + t * dy_row, dy_row, s.x + next * s.stride, s.stride,
              tile_taps, whole);
          for (const int64_t tile_end = t + kTile; t < tile_end; ++t, ++next) {
            position(t, whole);
            input_gradient(next, seen, whole);
          }
        } while (t + kTile <= end && s.tile(t));
        for (int64_t j = 0; j < kLastVectors; ++j) each_place(latest, kLastVectors, j, g(next + j), whole, [](const A* from, A* to) { store(to, load(from)); });
        continue;
      }
      position(t, 0);
      ++t;
      for (; next + k - 1 < t && next < end; ++next) input_gradient(next, seen, 0);
    }
    for (; next < end; ++next) input_gradient(next, seen, 0);
    for (int64_t j = 0; tile_taps != nullptr && j < kSumVectors; ++j)
      each_place(tile_sums, kSumVectors, j, sums + j * taps.row, whole, [](const A* from, A* to) { store(to, load(to) + load(from)); });
  }

  // Of the channels from `channel` on, here and below.
  void position(int64_t t, int64_t channel) const {
    for (int64_t at = channel; at < s.c; at += kBlock) {
      const int64_t n = std::min(kBlock, s.c - at);
      A* gt = g(t) + at;
      const T* dyt = dy + t * dy_row + at;
      if (silu) {
        filter_row(gt, s, taps, bias, zero, t, at, n);
        map_vectors(gt, n, [](Vec<A> (&v)[1]) __attribute__((always_inline)) { vector_silu_slope(v); });
        multiply_row(gt, dyt, n);
      } else {
        std::fill(gt, gt + n, A(0));
        add_row(gt, dyt, n);
      }
      if (t >= end) continue;
      for (int64_t j = 0; j < s.k; ++j)
        if (const T* x = s.input(t - s.k + 1 + j, t)) add_product(sums + j * taps.row + at, gt, x + at, n);
      add_row(sums + s.k * taps.row + at, gt, n);
    }
  }

  void input_gradient(int64_t i, int64_t seen, int64_t channel) const {
    const int64_t k = s.k, kept = i - (s.l - k + 1);  // its place in the final state
    A d[kBlock];
    for (int64_t at = channel; at < s.c; at += kBlock) {
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
  // The first and the last positions of one go by themselves, so that short ones cost more.
  const int64_t chunk = std::max({std::clamp<int64_t>((b * l + 7) / 8, kRows, 4 * kRows), 4 * k, (b * l + 63) / 64}), chunks = (l + chunk - 1) / chunk;
  visit_float(in.x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Taps<A> taps(in.weight);
    const Tensor bias_row = in.bias.defined() ? in.bias : zeros({c}, dtype_of<A>, kCpu);
    const Tensor packed = tile_taps(in.weight, bias_row.data<A>());
    const Tensor partial = zeros({b * chunks, k + 1, taps.row}, dtype_of<A>, kCpu);  // k rows of dweight, one of dbias
    A* partial_all = partial.data<A>();
    const T zero[kBlock] = {};
    const A no_gradient[kBlock] = {};
    const int64_t slots = BackwardPiece<T, A>::slots_for(k);
    parallel_for(0, b * chunks, std::max<int64_t>(1, kGrain / (std::min(chunk, l) * c * taps.padded)), [&](int64_t first, int64_t last) {
      const std::unique_ptr<A[]> ring(new A[static_cast<size_t>(slots * taps.row)]);
      const int64_t in_tiles = packed.defined() ? c : 0;
      Tensor tile_sums = empty({kSumVectors, in_tiles}, dtype_of<A>, kCpu), latest = empty({kLastVectors, in_tiles}, dtype_of<A>, kCpu);
      for (int64_t item = first; item < last; ++item) {
        const int64_t row = item / chunks, piece = item % chunks;
        const Sequence<T> s = sequence_of<T>(in, row);
        const bool keeps = k > 1;
        zero_(tile_sums);
        BackwardPiece<T, A>{
            .s = s, .taps = taps, .bias = bias_row.data<A>(), .dy = dy_in.data<T>() + row * dy_in.stride(0),
            .dfinal = dfinal_in.defined() && keeps ? dfinal_in.data<T>() + row * (k - 1) * c : nullptr,
            .dy_row = dy_in.stride(1), .begin = piece * chunk, .end = std::min(l, (piece + 1) * chunk),
            .dx = dx_out.data<T>() + row * dx_out.stride(0),
            .dinitial = dinitial_out.defined() && keeps ? dinitial_out.data<T>() + row * (k - 1) * c : nullptr,
            .dx_row = dx_out.stride(1), .sums = partial_all + item * (k + 1) * taps.row, .ring = ring.get(), .slots = slots,
            .tile_taps = packed.defined() ? packed.data<A>() : nullptr, .tile_sums = tile_sums.data<A>(),
            .latest = latest.data<A>(), .silu = in.silu, .zero = zero, .no_gradient = no_gradient}
            .run();
      }
    });
    A *dweight = dweight_out.data<A>(), *dbias = dbias_out.defined() ? dbias_out.data<A>() : nullptr;
    parallel_for(0, c, std::max<int64_t>(1, kGrain / ((k + 1) * b * chunks)), [&](int64_t first, int64_t last) {
      const int64_t n = last - first;
      for (int64_t i = 1; i < b * chunks; ++i)
        for (int64_t j = 0; j <= k; ++j) add_row(partial_all + j * taps.row + first, partial_all + (i * (k + 1) + j) * taps.row + first, n);
      for (int64_t i = first; i < last; ++i)
        for (int64_t j = 0; j < k; ++j)
          dweight[i * k + j] = (add_dweight ? dweight[i * k + j] : A(0)) + partial_all[j * taps.row + i];
      for (int64_t i = first; dbias != nullptr && i < last; ++i)
        dbias[i] = (add_dbias ? dbias[i] : A(0)) + partial_all[k * taps.row + i];
    });
  });
}

}  // namespace krait::kernels::cpu

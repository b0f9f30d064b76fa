#pragma once
// Chunks of the state-space recurrence on the CPU (kernels/ssd.h). Work units are (batch, chunk, group), so that C B^T
// is made once for the heads of a group and dB, dC are summed by one thread in order.
// Tiles are padded with zeros to whole vectors (attention_tile.h); states are held transposed, (n, p).
#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/put.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/ssd.h"

namespace krait::kernels::cpu::ssd {

template <class A> inline constexpr int64_t kPad = std::max<int64_t>(cpu::kLanes<A>, kStrip);
template <class A> inline int64_t padded(int64_t n) { return round_up(n, kPad<A>); }

/// A (b, l, heads, d) tensor with any strides but the last.
template <class T>
struct View {
  T* data = nullptr;
  int64_t batch = 0, row = 0, head = 0;
  View() = default;
  explicit View(const Tensor& t) : data(t.data<T>()), batch(t.stride(0)), row(t.stride(1)), head(t.stride(2)) {}
  T* at(int64_t b, int64_t l, int64_t h) const { return data + b * batch + l * row + h * head; }
};

/// Sizes of a call; np, pp, qp are padded.
template <class A>
struct Sizes {
  int64_t b, l, heads, p, g, n, chunk, chunks, group, np, pp, qp;
  explicit Sizes(const SsdInput& in)
      : b(in.x.size(0)), l(in.x.size(1)), heads(in.x.size(2)), p(in.x.size(3)), g(in.B.size(2)), n(in.B.size(3)),
        chunk(in.chunk), chunks((l + chunk - 1) / chunk), group(heads / g), np(padded<A>(n)), pp(padded<A>(p)),
        qp(padded<A>(chunk)) {}
  int64_t state() const { return np * pp; }
  Shape states() const { return {b, chunks, heads, state()}; }
};

/// Pieces of one zeroed block, 64-byte aligned.
template <class A>
class Workspace {
 public:
  explicit Workspace(int64_t values) : block_(zeros({values + 4096}, dtype_of<A>, kCpu)), next_(block_.data<A>()) {}
  A* take(int64_t values) {
    A* p = next_;
    next_ += round_up(values, 64);
    KRAIT_ASSERT(next_ <= block_.data<A>() + block_.numel(), "ssd: the workspace is too small");
    return p;
  }

 private:
  Tensor block_;
  A* next_;
};

/// Decays of one head in one chunk. Sums are made in double and kept as two numbers, so that the difference of two
/// sums near -1000 keeps the digits of fp32.
template <class A>
struct Decay {
  A *high, *low;              // s_i = high + low
  A *in, *out;                // e^{s_i} and e^{s_q - s_j}, 0 across a document boundary
  A total = 0;                // e^{s_q}, or 0
  std::vector<int64_t> end;   // one past the last position of j's document in the chunk

  Decay(Workspace<A>& w, int64_t qp)
      : high(w.take(qp)), low(w.take(qp)), in(w.take(qp)), out(w.take(qp)), end(static_cast<size_t>(qp)) {}
  static int64_t values(int64_t qp) { return 4 * (qp + 64); }

  /// a: log decays, `stride` apart. segments: of the chunk's positions, or null; at `row_start` nothing lies before.
  void fill(const A* a, int64_t stride, const int32_t* segments, bool row_start, int64_t q) {
    double s = 0;
    for (int64_t i = 0; i < q; ++i) {
      s += static_cast<double>(a[i * stride]);
      high[i] = static_cast<A>(s);
      low[i] = static_cast<A>(s - static_cast<double>(high[i]));
    }
    end[static_cast<size_t>(q - 1)] = q;
    for (int64_t j = q - 2; j >= 0; --j) {
      const bool cut = segments && segments[j] != segments[j + 1];
      end[static_cast<size_t>(j)] = cut ? j + 1 : end[static_cast<size_t>(j + 1)];
    }
    const bool fresh = segments && !row_start && segments[-1] != segments[0];
    const int64_t carried = fresh ? 0 : end[0];  // positions that see the state before the chunk
    const A last_high = high[q - 1], last_low = low[q - 1];
#pragma omp simd
    for (int64_t i = 0; i < q; ++i) {
      in[i] = vexp(high[i] + low[i]);
      out[i] = vexp((last_high - high[i]) + (last_low - low[i]));
    }
    total = carried == q ? in[q - 1] : A(0);
    for (int64_t i = carried; i < q; ++i) in[i] = 0;
    for (int64_t j = 0; j < q && end[static_cast<size_t>(j)] < q; ++j) out[j] = 0;
  }
};

/// Row j of the transposed mask: m[i] = e^{s_i - s_j} for i in [j, end_j), 0 in the rest of [from, qp).
template <class A>
inline void mask_row(A* __restrict m, const A* __restrict high, const A* __restrict low, int64_t j, int64_t end,
                     int64_t from, int64_t qp) {
  for (int64_t i = from; i < j; ++i) m[i] = 0;
  const A h = high[j], l = low[j];
#pragma omp simd
  for (int64_t i = j; i < end; ++i) m[i] = vexp((high[i] - h) + (low[i] - l));
  for (int64_t i = end; i < qp; ++i) m[i] = 0;
}

/// First column of row j's strip that is ever read.
template <class A> inline int64_t first_column(int64_t j) { return j / kPad<A> * kPad<A>; }

/// gt (qp, qp), rows j, columns i >= j: B_j . C_i. bt: rows of B; ct: C transposed (n, qp).
template <class A>
void products_of_group(A* gt, const A* rows, const A* ct, int64_t q, int64_t qp, int64_t k, int64_t row) {
  for (int64_t j = 0; j < q; j += kStrip) {
    const int64_t c = first_column<A>(j);
    multiply_strip<A>(gt + j * qp + c, qp, rows + j * row, row, 1, ct + c, qp, qp - c, k, false);
  }
}

/// to (rows, width) = factor_i * from; may be in place.
template <class A>
inline void scale_rows(A* to, const A* from, const A* factor, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    const A f = factor[i];
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) to[i * width + c] = f * from[i * width + c];
  }
}

/// s (n, pp) = rows^T weighted: sum_j rows[j, n] weighted[j, p].
template <class A>
inline void outer_sum(A* s, const A* rows, const A* weighted, int64_t q, const Sizes<A>& z) {
  for (int64_t n = 0; n < z.n; n += kStrip)
    multiply_strip<A>(s + n * z.pp, z.pp, rows + n, 1, z.np, weighted, z.pp, z.pp, q, false);
}

/// One pass over all chunks of one direction: calls f(b, chunk, group, first position, length) on every unit.
template <class A, class Make, class F>
void for_each_unit(const Sizes<A>& z, Make make_scratch, F f) {
  parallel_for(0, z.b * z.chunks * z.g, 1, [&](int64_t begin, int64_t end) {
    auto scratch = make_scratch();
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t g = unit % z.g, c = unit / z.g % z.chunks, b = unit / z.g / z.chunks, t0 = c * z.chunk;
      f(scratch, b, c, g, t0, std::min(z.chunk, z.l - t0));
    }
  });
}

/// States before each chunk, (b, chunks, heads, np pp), and the decay of each whole chunk, (b, chunks, heads).
/// Writes the final state where it is defined.
template <class T>
struct States {
  using A = accum_t<T>;
  Tensor before, totals;
  States(const SsdInput& in, Tensor* final_state);
};

/// Gradients of the state behind each chunk, (b, chunks, heads, np pp), from dy and the final state's (may be undefined).
/// Writes the initial state's where it is wanted.
template <class T>
struct StateGradients {
  using A = accum_t<T>;
  Tensor behind;
  StateGradients(const SsdInput& in, const Tensor& dy, const Tensor& dfinal, Tensor* dinitial);
};

extern template struct States<float>;
extern template struct States<double>;
extern template struct States<bf16>;
extern template struct StateGradients<float>;
extern template struct StateGradients<double>;
extern template struct StateGradients<bf16>;

/// What a unit needs to sum outer products of rows (q, np) with others (q, pp), weighted by decays.
template <class A>
struct OuterScratch {
  Workspace<A> w;
  A *rows, *others;
  Decay<A> decay;
  explicit OuterScratch(const Sizes<A>& s)
      : w(s.qp * (s.np + s.pp) + 256 + Decay<A>::values(s.qp)), rows(w.take(s.qp * s.np)), others(w.take(s.qp * s.pp)),
        decay(w, s.qp) {}
};

/// The padded transpose (n, pp) of a state (p, n), and back.
template <class A>
void put_state(A* to, const A* from, const Sizes<A>& z) {
  for (int64_t n = 0; n < z.n; ++n)
    for (int64_t p = 0; p < z.p; ++p) to[n * z.pp + p] = from[p * z.n + n];
}
template <class A>
void get_state(A* to, const A* from, const Sizes<A>& z) {
  for (int64_t p = 0; p < z.p; ++p)
    for (int64_t n = 0; n < z.n; ++n) to[p * z.n + n] = from[n * z.pp + p];
}

/// In every head, from the first chunk to the last or back: each chunk's own part of the state, (b, chunks, heads, np pp),
/// is replaced by the state that arrives there, which goes on as total * state + part. `start` (b, heads, p, n) may be
/// undefined; `end` takes what leaves, where it is wanted.
template <class A>
void carry_over_chunks(A* parts, const A* totals, const Tensor& start, Tensor* end, bool backwards, const Sizes<A>& z) {
  parallel_for(0, z.b * z.heads, 1, [&](int64_t first, int64_t last) {
    std::vector<A> state(static_cast<size_t>(z.state()));
    for (int64_t i = first; i < last; ++i) {
      A* __restrict running = state.data();
      std::fill(state.begin(), state.end(), A(0));
      if (start.defined()) put_state(running, start.data<A>() + i * z.p * z.n, z);
      for (int64_t step = 0; step < z.chunks; ++step) {
        const int64_t c = backwards ? z.chunks - 1 - step : step;
        const int64_t unit = (i / z.heads * z.chunks + c) * z.heads + i % z.heads;
        A* __restrict own = parts + unit * z.state();
        const A decay = totals[unit];
#pragma omp simd
        for (int64_t k = 0; k < z.n * z.pp; ++k) {
          const A arriving = running[k];
          running[k] = decay * arriving + own[k];
          own[k] = arriving;
        }
      }
      if (end) get_state(end->data<A>() + i * z.p * z.n, running, z);
    }
  });
}

}  // namespace krait::kernels::cpu::ssd

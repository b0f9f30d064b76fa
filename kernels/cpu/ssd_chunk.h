#pragma once
// Chunks of the state-space recurrence on the CPU (kernels/ssd.h), as products that all heads of a block share.
// With e_i = e^{a_2 + ... + a_i} in a chunk, M_ij = e_i / e_j is a product of two factors, so with
//   u_j = dt_j x_j / e_j      h' = e^{a_1} h_in      G_ij = C_i . B_j for i >= j, else 0
//   y_i = e_i (sum_j G_ij u_j + C_i h') + D x_i      h_out = e_q (h' + sum_j B_j (x) u_j)
// and neither G nor the products know of the heads: their channels lie side by side, up to kWidth of them, fewer where
// the state of so many would have more than kState values (it is read and written in every chunk), and the
// exponentials are two for a position of a head. A chunk ends before the sum of one of the heads passes kRange, so that
// 1 / e_j <= e^kRange; a single position fits always. Finite values that come later change nothing, to the last bit, in a
// sequence of the same length. Documents are masks on G, on the positions that see h' (the first document) and on those
// that reach h_out (the last).
// States are held transposed, (n, channels), rows `ws` apart: not a multiple of 4 KiB, whose rows would share few sets of
// the cache.
#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "core/parallel.h"
#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/put.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/ssd.h"

namespace krait::kernels::cpu::ssd {

inline constexpr int64_t kChunk = 32, kWidth = 256, kLeastWidth = 64, kState = 16384;
inline constexpr double kRange = 40;
template <class A> inline constexpr int64_t kTile = 2 * kLanes<A>;  // columns of a register block
static_assert(kChunk % kStrip == 0 && kChunk % kTile<float> == 0);

/// A (b, l, heads, d) tensor with any strides but the last.
template <class T>
struct View {
  T* data = nullptr;
  int64_t batch = 0, row = 0, head = 0;
  View() = default;
  explicit View(const Tensor& t) : data(t.data<T>()), batch(t.stride(0)), row(t.stride(1)), head(t.stride(2)) {}
  T* at(int64_t b, int64_t l, int64_t h) const { return data + b * batch + l * row + h * head; }
};

/// A block of heads of one group in one sequence.
struct Unit {
  int64_t b, group, block, head, heads;
};

/// What a call is cut into, by its shape alone. Pieces of a sequence go in parallel and bound the states that the
/// backward keeps.
template <class A>
struct Sizes {
  int64_t b, l, heads, p, g, n, chunk, group, block, blocks, np, width, ws, units, piece, pieces;
  explicit Sizes(const SsdInput& in)
      : b(in.x.size(0)), l(in.x.size(1)), heads(in.x.size(2)), p(in.x.size(3)), g(in.B.size(2)), n(in.B.size(3)),
        chunk(std::min(in.chunk, kChunk)), group(heads / g), block(std::clamp<int64_t>(std::clamp(kState / n, kLeastWidth, kWidth) / p, 1, group)),
        blocks((group + block - 1) / block), np(round_up(n, std::max<int64_t>(kStrip, kLanes<A>))),
        width(round_up(block * p, kTile<A>)), ws(width + kLanes<A>), units(b * g * blocks) {
    const int64_t wanted = (16 + units - 1) / units;
    piece = std::min(l, std::clamp<int64_t>(round_up((l + wanted - 1) / wanted, kChunk), 4 * kChunk, 16 * kChunk));
    pieces = (l + piece - 1) / piece;
  }
  int64_t state() const { return np * ws; }
  Unit unit(int64_t i) const {
    const int64_t k = i % blocks, j = i / blocks % g, head = j * group + k * block;
    return {i / blocks / g, j, k, head, std::min(block, (j + 1) * group - head)};
  }
};

/// Pieces of one block, 64-byte aligned; zeroed, unless the user sees to it.
template <class A>
class Workspace {
 public:
  explicit Workspace(int64_t values, bool zeroed = true)
      : block_(zeroed ? zeros({values + 4096}, dtype_of<A>, kCpu) : empty({values + 4096}, dtype_of<A>, kCpu)),
        next_(block_.data<A>()) {}
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

/// Positions [begin, begin + q) of a piece. The first document in it ends at `first`, the last begins at `last`.
struct Chunk {
  int64_t begin, q, first, last;
  bool whole() const { return first == q; }  // one document: the state passes through
};

/// The chunks of a piece and the decays of a block of heads in it.
template <class A>
struct Decays {
  std::vector<Chunk> chunks;
  std::vector<A> up, down;  // (positions, heads): e_i and 1 / e_i
  std::vector<A> in, out;   // (chunks, heads): e^{a_1}, 0 where a document begins, and e_q

  /// a and segments (may be null) from the piece's first position of `l`; a's positions `row` apart. At `row_start`
  /// nothing lies before.
  void fill(const A* a, int64_t row, int64_t heads, const int32_t* segments, bool row_start, int64_t l, int64_t most) {
    const size_t values = static_cast<size_t>(l * heads);
    chunks.clear();
    in.clear();
    out.clear();
    sums_.assign(values, 0);
    up.resize(values);
    down.resize(values);
    const auto begins = [&](int64_t t) { return segments && (t > 0 || !row_start) && segments[t - 1] != segments[t]; };
    for (int64_t t = 0; t < l; t += chunks.back().q) {
      Chunk c{t, 1, 0, 0};
      for (; t + c.q < l && c.q < most; ++c.q) {
        const bool cut = begins(t + c.q);
        double* sum = sums_.data() + (t + c.q) * heads;
        double widest = 0;
        for (int64_t h = 0; h < heads; ++h) {
          sum[h] = sum[h - heads] + (cut ? 0.0 : static_cast<double>(a[(t + c.q) * row + h]));
          widest = std::max(widest, std::fabs(sum[h]));
        }
        if (widest > kRange) break;
        if (cut && c.first == 0) c.first = c.q;
        if (cut) c.last = c.q;
      }
      if (c.first == 0) c.first = c.q;
      for (int64_t h = 0; h < heads; ++h) {
        in.push_back(begins(t) ? A(0) : static_cast<A>(std::exp(static_cast<double>(a[t * row + h]))));
        out.push_back(static_cast<A>(std::exp(sums_[static_cast<size_t>((t + c.q - 1) * heads + h)])));
      }
      // A sum that went too far belongs to the next chunk, where it begins with 0.
      if (t + c.q < l) std::fill_n(sums_.begin() + (t + c.q) * heads, heads, 0.0);
      chunks.push_back(c);
    }
    A *to = up.data(), *inverse = down.data();
    const double* sum = sums_.data();
#pragma omp simd
    for (size_t i = 0; i < values; ++i) {
      const A high = static_cast<A>(sum[i]), low = static_cast<A>(sum[i] - static_cast<double>(high));
      to[i] = vexp(high) * (A(1) + low);
      inverse[i] = vexp(-high) * (A(1) - low);
    }
  }

 private:
  std::vector<double> sums_;
};

/// A register block of kStrip rows by NV vectors += a (kStrip, k) b (k, NV vectors); a(i, x) = a[i a_row + x a_column].
template <class A, int NV>
[[gnu::always_inline]] inline void add_product(Vec<A> (&sum)[kStrip][NV], const A* a, int64_t a_row, int64_t a_column, const A* b, int64_t b_row,
                                               int64_t k) {
#pragma GCC unroll 4
  for (int64_t x = 0; x < k; ++x, a += a_column, b += b_row) {
    Vec<A> row[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      row[v] = load(b + v * kLanes<A>);
      keep(row[v]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kStrip; ++i) {
      const A factor = a[i * a_row];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sum[i][v] += factor * row[v];
    }
  }
}
/// One such block: the sum over k of a's column times b's row, where k runs over two pairs of matrices one after the other.
/// `done(i, v, sum)` takes every vector.
template <class A>
struct Factors {
  const A *a, *b;
  int64_t k, a_column, b_row;
};
template <class A, int NV, class Done>
[[gnu::always_inline]] inline void multiply_tile(int64_t a_row, const Factors<A>& one, const Factors<A>& two, Done&& done) {
  Vec<A> sum[kStrip][NV] = {};
  add_product<A>(sum, one.a, a_row, one.a_column, one.b, one.b_row, one.k);
  add_product<A>(sum, two.a, a_row, two.a_column, two.b, two.b_row, two.k);
#pragma GCC unroll 8
  for (int i = 0; i < kStrip; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) done(i, v, sum[i][v]);
}
/// The same with a's columns contiguous (its strip's rows next to each other), and one pair.
template <class A, class Done>
[[gnu::always_inline]] inline void multiply_columns(const A* a, int64_t a_column, const A* b, int64_t b_row, int64_t k, Done&& done) {
  multiply_tile<A, 2>(1, {a, b, k, a_column, b_row}, {a, b, 0, 0, 0}, done);
}
/// With a's rows contiguous, `a_row` apart.
template <class A, class Done>
[[gnu::always_inline]] inline void multiply_rows(const A* a, int64_t a_row, const A* b, int64_t b_row, int64_t k, Done&& done) {
  multiply_tile<A, 2>(a_row, {a, b, k, 1, b_row}, {a, b, 0, 0, 0}, done);
}

/// f(p), with the usual head dimensions known at compile time: loops over one have few turns.
template <class F>
[[gnu::always_inline]] inline void with_head_dim(int64_t p, F&& f) {
  if (p == 32)
    f(std::integral_constant<int64_t, 32>());
  else if (p == 64)
    f(std::integral_constant<int64_t, 64>());
  else
    f(p);
}

/// to (rows, ws) = from (rows; heads, p) times a factor of every row and head, zero up to `width` and in the rows up to
/// kChunk, where there are fewer.
template <class A, class T>
void pack_scaled(A* to, const T* from, int64_t from_row, int64_t from_head, const A* factors, const A* more, int64_t more_row,
                 const Unit& u, int64_t rows, const Sizes<A>& z) {
  with_head_dim(z.p, [&](auto p) __attribute__((always_inline)) {
    for (int64_t i = 0; i < rows; ++i) {
      A* __restrict out = to + i * z.ws;
      for (int64_t h = 0; h < u.heads; ++h) {
        const A f = factors[i * u.heads + h] * (more ? more[i * more_row + h] : A(1));
        const T* __restrict in = from + i * from_row + h * from_head;
        A* __restrict at = out + h * p;
#pragma omp simd
        for (int64_t c = 0; c < p; ++c) at[c] = f * static_cast<A>(in[c]);
      }
      std::fill(out + u.heads * p, out + z.width, A(0));
    }
  });
  if (rows < kChunk) std::fill(to + rows * z.ws, to + kChunk * z.ws, A(0));
}

/// y = e_i sums + D x.
template <class T, class A>
void store_outputs(T* y, int64_t y_row, int64_t y_head, const A* sums, const A* up, const T* x, int64_t x_row, int64_t x_head,
                   const A* D, const Unit& u, int64_t q, const Sizes<A>& z) {
  with_head_dim(z.p, [&](auto p) __attribute__((always_inline)) {
    for (int64_t i = 0; i < q; ++i)
      for (int64_t h = 0; h < u.heads; ++h) {
        const A f = up[i * u.heads + h];
        const A* __restrict sum = sums + i * z.ws + h * p;
        T* __restrict to = y + i * y_row + h * y_head;
        if (D) {
          const T* __restrict from = x + i * x_row + h * x_head;
          const A* __restrict d = D + h * p;
#pragma omp simd
          for (int64_t c = 0; c < p; ++c) put(to[c], f * sum[c] + d[c] * static_cast<A>(from[c]));
        } else {
#pragma omp simd
          for (int64_t c = 0; c < p; ++c) put(to[c], f * sum[c]);
        }
      }
  });
}

/// The value of each head in its p columns.
template <class A>
void spread(A* to, const A* values, const A* times, const Unit& u, const Sizes<A>& z) {
  for (int64_t h = 0; h < u.heads; ++h)
    std::fill(to + h * z.p, to + (h + 1) * z.p, times ? values[h] * times[h] : values[h]);
  std::fill(to + u.heads * z.p, to + z.width, A(0));
}

/// to (i, j) = sum_n rows (n, i) columns (n, j), i < q rounded up to strips, all of kChunk apart.
template <class A>
void chunk_products(A* to, const A* rows, const A* columns, int64_t q, const Sizes<A>& z) {
  for (int64_t j = 0; j < kChunk; j += kTile<A>)
    for (int64_t i = 0; i < q; i += kStrip)
      multiply_columns<A>(rows + i, kChunk, columns + j, kChunk, z.n, [&](int r, int v, Vec<A> sum) __attribute__((always_inline)) {
        store(to + (i + r) * kChunk + j + v * kLanes<A>, sum);
      });
}

/// to (n, ws) = factor of the column * (from + rows^T others), rows (k, np), others (k, ws); `from` null counts as 0 and
/// may be `to`.
template <class A>
void update_state(A* to, const A* from, const A* rows, const A* others, int64_t k, const A* factor, const Sizes<A>& z) {
  for (int64_t w = 0; w < z.width; w += kTile<A>)
    for (int64_t n = 0; n < z.n; n += kStrip)
      multiply_columns<A>(rows + n, z.np, others + w, z.ws, k, [&](int i, int v, Vec<A> sum) __attribute__((always_inline)) {
        const int64_t at = (n + i) * z.ws + w + v * kLanes<A>;
        if (from) sum += load(from + at);
        store(to + at, sum * load(factor + w + v * kLanes<A>));
      });
}

/// Columns [first, last) of from (n, kChunk), the others 0.
template <class A>
const A* columns_from_to(A* to, const A* from, int64_t first, int64_t last, const Sizes<A>& z) {
  for (int64_t n = 0; n < z.np; ++n)
    for (int64_t i = 0; i < kChunk; ++i) to[n * kChunk + i] = i >= first && i < last ? from[n * kChunk + i] : A(0);
  return to;
}

/// A state (heads, p, n) of the unit's heads as (n, ws), and back.
template <class A>
void put_state(A* to, const A* from, const Unit& u, const Sizes<A>& z) {
  for (int64_t n = 0; n < z.n; ++n)
    for (int64_t c = 0; c < u.heads * z.p; ++c) to[n * z.ws + c] = from[c * z.n + n];
}
template <class A>
void get_state(A* to, const A* from, const Unit& u, const Sizes<A>& z) {
  for (int64_t c = 0; c < u.heads * z.p; ++c)
    for (int64_t n = 0; n < z.n; ++n) to[c * z.n + n] = from[n * z.ws + c];
}
template <class A>
void scale_state(A* s, const A* factor, const Sizes<A>& z) {
  for (int64_t n = 0; n < z.n; ++n) {
    A* __restrict row = s + n * z.ws;
#pragma omp simd
    for (int64_t c = 0; c < z.width; ++c) row[c] *= factor[c];
  }
}

/// A call's inputs, read by units.
template <class T>
struct Reader {
  using A = accum_t<T>;
  Sizes<A> z;
  View<const T> x, B, C;
  const A *a, *dt;
  const int32_t* segments;
  explicit Reader(const SsdInput& in)
      : z(in), x(in.x), B(in.B), C(in.C), a(in.a.data<A>()), dt(in.dt.defined() ? in.dt.data<A>() : nullptr),
        segments(in.segments.defined() ? in.segments.data<int32_t>() : nullptr) {}
  int64_t length(int64_t piece) const { return std::min(z.piece, z.l - piece * z.piece); }
  void fill(Decays<A>& d, const Unit& u, int64_t piece) const {
    const int64_t at = u.b * z.l + piece * z.piece;
    d.fill(a + at * z.heads + u.head, z.heads, u.heads, segments ? segments + at : nullptr, piece == 0, length(piece), z.chunk);
  }
  /// u_j of a chunk that begins at t of the sequence.
  void pack_inputs(A* to, const Decays<A>& d, const Chunk& c, const Unit& u, int64_t t) const {
    pack_scaled(to, x.at(u.b, t, u.head), x.row, x.head, d.down.data() + c.begin * u.heads,
                dt ? dt + (u.b * z.l + t) * z.heads + u.head : nullptr, z.heads, u, c.q, z);
  }
  /// Rows (q, np) of B or C, zero up to kChunk rows.
  void pack_group(A* to, const View<const T>& from, const Chunk& c, const Unit& u, int64_t t) const {
    pack_rows<A>(to, z.np, from.at(u.b, t, u.group), from.row, c.q, z.n, kChunk);
  }
  const A* start_of(const Tensor& state, const Unit& u) const {
    return state.defined() ? state.data<A>() + (u.b * z.heads + u.head) * z.p * z.n : nullptr;
  }
};

/// f(scratch, unit number, piece) for all of them; a scratch for each thread.
template <class Scratch, class A, class F>
void for_each_piece(const Sizes<A>& z, F f) {
  std::vector<std::unique_ptr<Scratch>> scratch(static_cast<size_t>(num_threads()));
  run_pieces(z.units * z.pieces, [&](int64_t i, int thread) {
    std::unique_ptr<Scratch>& own = scratch[static_cast<size_t>(thread)];
    if (!own) own = std::make_unique<Scratch>(z);
    f(*own, i / z.pieces, i % z.pieces);
  });
}

/// What arrives at each piece: states from the front, or gradients of states from dy and the end.
template <class T>
struct PieceStates {
  using A = accum_t<T>;
  Tensor arriving;  // (units, pieces, np, ws)
  /// dy undefined: states. `start` (b, heads, p, n), may be undefined, is what arrives at the first piece (the last);
  /// `end`, where it is wanted, takes what leaves the last (the first).
  PieceStates(const SsdInput& in, const Tensor& dy, const Tensor& start, Tensor* end);
  const A* at(int64_t unit, int64_t piece, const Sizes<A>& z) const {
    return arriving.data<A>() + (unit * z.pieces + piece) * z.state();
  }
};
extern template struct PieceStates<float>;
extern template struct PieceStates<double>;
extern template struct PieceStates<bf16>;

/// What arrives at a piece: of `pieces` where the sequence is cut, else `start`.
template <class T, class A = accum_t<T>>
void load_state(A* to, const PieceStates<T>* pieces, const Tensor& start, int64_t unit, int64_t piece, const Reader<T>& r) {
  const Unit u = r.z.unit(unit);
  if (pieces) {
    std::copy_n(pieces->at(unit, piece, r.z), r.z.state(), to);
    return;
  }
  std::fill_n(to, r.z.state(), A(0));
  if (start.defined()) put_state(to, r.start_of(start, u), u, r.z);
}

}  // namespace krait::kernels::cpu::ssd

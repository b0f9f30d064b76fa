#include "kernels/cpu/ssd_square.h"

#include <array>

#include "kernels/cpu/ssd_gradient.h"

namespace krait::kernels::cpu::ssd {

namespace {

// The sequence's chunks I, J, ... (ssd_chunk.h) keep the decays in range: with F_IJ the decay from J's first position to I's,
//   y_i = e_i sum_{J <= I} F_IJ sum_{j in J} G_ij u_j + D x_i
// is summed from the first chunk to the last, the sum so far being multiplied by the decay from one chunk to the next;
// du_j = sum_{I >= J} F_IJ sum_{i in I} G_ij v_i likewise from the last. In E_ij = F_IJ v_i . u_j the decays are a row for
// each I. Beyond the diagonal, and between documents, G is zero.
constexpr int64_t kSquare = 128;

// The sums of one register block of kStrip rows by two vectors, over any number of pairs of matrices.
template <class A>
struct Block {
  Vec<A> sum[kStrip][2] = {};

  [[gnu::always_inline]] void add(const A* a, int64_t a_row, int64_t a_column, const A* b, int64_t b_row, int64_t k) {
    add_product<A>(sum, a, a_row, a_column, b, b_row, k);
  }
  [[gnu::always_inline]] void scale_columns(const A* factor) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const Vec<A> by = load(factor + v * kLanes<A>);
#pragma GCC unroll 8
      for (int i = 0; i < kStrip; ++i) sum[i][v] *= by;
    }
  }
  [[gnu::always_inline]] void scale_rows(const A* factor) {
#pragma GCC unroll 8
    for (int i = 0; i < kStrip; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) sum[i][v] *= factor[i];
  }
  template <class F>
  [[gnu::always_inline]] void each(F&& f) const {
#pragma GCC unroll 8
    for (int i = 0; i < kStrip; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) f(i, v, sum[i][v]);
  }
  [[gnu::always_inline]] void put(A* to, int64_t to_row) const {
    each([=](int i, int v, const Vec<A>& value) __attribute__((always_inline)) { store(to + i * to_row + v * kLanes<A>, value); });
  }
};

// Blocks of rows begin anywhere and end behind the last position: matrices have rows to spare. `ls` and `ns` are rows of
// positions and of B's values, not a multiple of 4 KiB / 8.
template <class A>
struct Lengths {
  int64_t l, lp, rows, ls, nw, ns;
  explicit Lengths(const Sizes<A>& z)
      : l(z.l), lp(round_up(l, kTile<A>)), rows(lp + kTile<A>), ls(lp + kTile<A>), nw(round_up(z.n, kTile<A>)), ns(nw + kTile<A>) {}
};

// What forward and backward share: B, C, their masked products G, u, and the decays between chunks.
template <class A>
struct Square {
  A *b_rows, *c_rows, *bt, *g, *u;
  std::vector<A> factors;      // (chunks, width), from the chunk before
  std::vector<int64_t> start;  // of each position's document
  Decays<A> decays;
  static int64_t values(const Sizes<A>& z) {
    const Lengths<A> m(z);
    return m.rows * (2 * m.ns + m.ls + z.ws) + m.nw * m.ls + 512;
  }
  Square(Workspace<A>& w, const Sizes<A>& z) : start(static_cast<size_t>(z.l)) {
    const Lengths<A> m(z);
    b_rows = w.take(m.rows * m.ns);
    c_rows = w.take(m.rows * m.ns);
    bt = w.take(m.nw * m.ls);
    g = w.take(m.rows * m.ls);
    u = w.take(m.rows * z.ws);
    clear_rest(u, m, z);
  }
  /// Rows behind the last position: what blocks make of them is not used, but must not be a NaN where it meets a zero.
  static void clear_rest(A* rows, const Lengths<A>& m, const Sizes<A>& z) { std::fill(rows + m.l * z.ws, rows + m.rows * z.ws, A(0)); }

  /// Zero above the diagonal, as far as a block of rows or columns reads, and before i's document.
  void mask(A* square, const Lengths<A>& m) const {
    for (int64_t i = 0; i < m.l; ++i) {
      A* row = square + i * m.ls;
      std::fill(row, row + start[static_cast<size_t>(i)], A(0));
      std::fill(row + i + 1, row + std::min(m.ls, round_up(i + 1, kTile<A>) + kTile<A>), A(0));
    }
  }

  template <class T>
  void fill(const Reader<T>& r, const Unit& unit, const Lengths<A>& m) {
    const Sizes<A>& z = r.z;
    r.fill(decays, unit, 0);
    const int32_t* segments = r.segments ? r.segments + unit.b * z.l : nullptr;
    for (int64_t i = 1; segments && i < m.l; ++i)
      start[static_cast<size_t>(i)] = segments[i] == segments[i - 1] ? start[static_cast<size_t>(i - 1)] : i;
    pack_rows<A>(b_rows, m.ns, r.B.at(unit.b, 0, unit.group), r.B.row, m.l, z.n, m.rows);
    pack_rows<A>(c_rows, m.ns, r.C.at(unit.b, 0, unit.group), r.C.row, m.l, z.n, m.rows);
    transpose<A>(bt, m.ls, b_rows, m.ns, m.lp, m.nw);
    for (int64_t j = 0; j < m.lp; j += kTile<A>) {
      for (int64_t i = j; i < m.l; i += kStrip) {
        Block<A> block;
        block.add(c_rows + i * m.ns, m.ns, 1, bt + j, m.ls, z.n);
        block.put(g + i * m.ls + j, m.ls);
      }
    }
    mask(g, m);
    r.pack_inputs(u, decays, {0, m.l, m.l, 0}, unit, 0);
    factors.resize(decays.chunks.size() * static_cast<size_t>(z.width));
    for (size_t k = 1; k < decays.chunks.size(); ++k)
      spread(factors.data() + static_cast<int64_t>(k) * z.width, decays.out.data() + static_cast<int64_t>(k - 1) * unit.heads,
             decays.in.data() + static_cast<int64_t>(k) * unit.heads, unit, z);
  }
  const A* factor_of(size_t k, const Sizes<A>& z) const { return factors.data() + static_cast<int64_t>(k) * z.width; }
};

template <class A>
struct SquareForward {
  Workspace<A> w;
  Square<A> s;
  A *y, *last;
  explicit SquareForward(const Sizes<A>& z) : w(Square<A>::values(z) + Lengths<A>(z).rows * z.ws + z.width + 256, false), s(w, z) {
    y = w.take(Lengths<A>(z).rows * z.ws);
    last = w.take(z.width);
  }

  void outputs(const Lengths<A>& m, const Sizes<A>& z) {
    const std::vector<Chunk>& chunks = s.decays.chunks;
    for (int64_t x = 0; x < z.width; x += kTile<A>) {
      for (size_t k = 0; k < chunks.size(); ++k)
        for (int64_t i = 0; i < chunks[k].q; i += kStrip) {
          const A* row = s.g + (chunks[k].begin + i) * m.ls;
          Block<A> block;
          for (size_t j = 0; j <= k; ++j) {
            const Chunk& c = chunks[j];
            if (j > 0) block.scale_columns(s.factor_of(j, z) + x);
            block.add(row + c.begin, m.ls, 1, s.u + c.begin * z.ws + x, z.ws, j < k ? c.q : std::min(c.q, i + kStrip));
          }
          block.put(y + (chunks[k].begin + i) * z.ws + x, z.ws);
        }
    }
  }

  /// (heads, p, n) from the last document's positions.
  void final_state(A* to, const Unit& unit, const Lengths<A>& m, const Sizes<A>& z) {
    const std::vector<Chunk>& chunks = s.decays.chunks;
    const int64_t from = s.start.back();
    size_t first = 0;
    while (chunks[first].begin + chunks[first].q <= from) ++first;
    spread<A>(last, s.decays.out.data() + static_cast<int64_t>(chunks.size() - 1) * unit.heads, nullptr, unit, z);
    for (int64_t n = 0; n < z.n; n += kTile<A>)
      for (int64_t c = 0; c < unit.heads * z.p; c += kStrip) {
        Block<A> block;
        for (size_t j = first; j < chunks.size(); ++j) {
          const int64_t begin = std::max(from, chunks[j].begin);
          if (j > first) block.scale_rows(s.factor_of(j, z) + c);
          block.add(s.u + begin * z.ws + c, 1, z.ws, s.b_rows + begin * m.ns + n, m.ns, chunks[j].begin + chunks[j].q - begin);
        }
        block.scale_rows(last + c);
        A tile[kStrip * kTile<A>];
        block.put(tile, kTile<A>);
        const int64_t rows = std::min<int64_t>(kStrip, unit.heads * z.p - c), columns = std::min(kTile<A>, z.n - n);
        for (int64_t i = 0; i < rows; ++i) std::copy_n(tile + i * kTile<A>, columns, to + (c + i) * z.n + n);
      }
  }
};

template <class A>
struct SquareBackward {
  Workspace<A> w;
  Square<A> s;
  A *v, *du, *ut, *gamma, *weights, *d;
  std::vector<A> decay;       // (chunks, ls) of a head: F_IJ of every position of J
  std::vector<const A*> row;  // of `decay`, of every position
  std::vector<Vec<A>> sums;
  static int64_t values(const Sizes<A>& z) {
    const Lengths<A> m(z);
    return Square<A>::values(z) + m.rows * (2 * z.ws + 2 * m.ls + m.ns) + round_up(z.p, kLanes<A>) * m.ls + 512;
  }
  explicit SquareBackward(const Sizes<A>& z) : w(values(z), false), s(w, z), sums(static_cast<size_t>(z.l)) {
    const Lengths<A> m(z);
    v = w.take(m.rows * z.ws);
    du = w.take(m.rows * z.ws);
    ut = w.take(round_up(z.p, kLanes<A>) * m.ls);
    gamma = w.take(m.rows * m.ls);
    weights = w.take(m.rows * m.ls);
    d = w.take(m.rows * m.ns);
    Square<A>::clear_rest(v, m, z);
    std::fill_n(weights, m.rows * m.ls, A(0));  // above the diagonal sums read more than is written
    row.resize(static_cast<size_t>(m.rows));
  }

  void input_gradients(const Lengths<A>& m, const Sizes<A>& z) {
    const std::vector<Chunk>& chunks = s.decays.chunks;
    for (int64_t x = 0; x < z.width; x += kTile<A>) {
      for (size_t k = 0; k < chunks.size(); ++k)
        for (int64_t i = 0; i < chunks[k].q; i += kStrip) {
          const int64_t j = chunks[k].begin + i;
          Block<A> block;
          for (size_t from = chunks.size() - 1; from > k; --from) {
            const Chunk& c = chunks[from];
            block.add(s.g + c.begin * m.ls + j, 1, m.ls, v + c.begin * z.ws + x, z.ws, c.q);
            block.scale_columns(s.factor_of(from, z) + x);
          }
          block.add(s.g + j * m.ls + j, 1, m.ls, v + j * z.ws + x, z.ws, chunks[k].q - i);
          block.put(du + j * z.ws + x, z.ws);
        }
    }
  }

  void fill_decay(int64_t h, const Unit& unit, const Lengths<A>& m) {
    const std::vector<Chunk>& chunks = s.decays.chunks;
    decay.assign(chunks.size() * static_cast<size_t>(m.ls), A(0));
    for (size_t k = 0; k < chunks.size(); ++k) {
      A value = 1;
      A* to = decay.data() + static_cast<int64_t>(k) * m.ls;
      for (size_t j = k + 1; j-- > 0;) {
        std::fill_n(to + chunks[j].begin, chunks[j].q, value);
        if (j > 0)
          value *= s.decays.out[(j - 1) * static_cast<size_t>(unit.heads) + static_cast<size_t>(h)] *
                   s.decays.in[j * static_cast<size_t>(unit.heads) + static_cast<size_t>(h)];
      }
      std::fill_n(row.data() + chunks[k].begin, chunks[k].q, to);
    }
    std::fill(row.begin() + m.l, row.end(), row[static_cast<size_t>(m.l - 1)]);
  }

  /// gamma += E of a head, weights = E G.
  void head(int64_t h, const Unit& unit, const Lengths<A>& m, const Sizes<A>& z) {
    fill_decay(h, unit, m);
    transpose<A>(ut, m.ls, s.u + h * z.p, z.ws, m.lp, round_up(z.p, kLanes<A>));
    for (int64_t j = 0; j < m.lp; j += kTile<A>) {
      for (int64_t i = j; i < m.l; i += kStrip) {
        Block<A> block;
        block.add(v + i * z.ws + h * z.p, z.ws, 1, ut + j, m.ls, z.p);
        block.each([&](int r, int x, const Vec<A>& sum) __attribute__((always_inline)) {
          const int64_t column = j + x * kLanes<A>, at = (i + r) * m.ls + column;
          const Vec<A> e = sum * load(row[static_cast<size_t>(i + r)] + column);
          store(gamma + at, load(gamma + at) + e);
          store(weights + at, e * load(s.g + at));
        });
      }
    }
  }

  /// da[r] = sum_{i >= r > j} W_ij, whose sums over i grow from the last row, some columns at a time.
  void decay_sums(A* da, int64_t stride, const Lengths<A>& m) {
    static const auto ones = [] {
      std::array<A, 2 * kChunk> o{};
      std::fill_n(o.begin(), kChunk, A(1));
      return o;
    }();
    constexpr int64_t kVectors = kChunk / kLanes<A>;
    std::fill(sums.begin(), sums.end(), Vec<A>{});
    for (int64_t column = 0; column < m.l; column += kChunk) {
      Vec<A> running[kVectors] = {};
      for (int64_t r = m.l - 1; r >= column; --r) {
        const A *from = weights + r * m.ls + column, *counts = ones.data() + std::max<int64_t>(0, kChunk - (r - column));
        Vec<A> sum = sums[static_cast<size_t>(r)];
#pragma GCC unroll 16
        for (int64_t x = 0; x < kVectors; ++x) {
          running[x] += load(from + x * kLanes<A>);
          sum += running[x] * load(counts + x * kLanes<A>);
        }
        sums[static_cast<size_t>(r)] = sum;
      }
    }
    for (int64_t r = 0; r < m.l; ++r) da[r * stride] = total<A>(sums[static_cast<size_t>(r)]);
  }

  /// d = gamma B (dC), or gamma^T C (dB).
  void group_gradient(bool of_c, const Lengths<A>& m) {
    for (int64_t n = 0; n < m.nw; n += kTile<A>) {
      for (int64_t i = 0; i < m.l; i += kStrip) {
        Block<A> block;
        if (of_c)
          block.add(gamma + i * m.ls, m.ls, 1, s.b_rows + n, m.ns, std::min(m.l, i + kStrip));
        else
          block.add(gamma + i * m.ls + i, 1, m.ls, s.c_rows + i * m.ns + n, m.ns, m.l - i);
        block.put(d + i * m.ns + n, m.ns);
      }
    }
  }
};

}  // namespace

template <class T>
bool in_one_square(const SsdInput& in) {
  const Sizes<accum_t<T>> z(in);
  return !in.initial_state.defined() && z.pieces == 1 && z.l > kChunk && z.l <= std::min({kSquare, 2 * z.n, 2 * in.chunk});
}

template <class T>
void square_forward(Tensor& y_out, Tensor& final_state, const SsdInput& in) {
  using A = accum_t<T>;
  const Reader<T> r(in);
  const Sizes<A>& z = r.z;
  const Lengths<A> m(z);
  const View<T> y(y_out);
  const A* D = in.D.defined() ? in.D.data<A>() : nullptr;
  for_each_piece<SquareForward<A>>(z, [&](SquareForward<A>& f, int64_t i, int64_t) {
    const Unit u = z.unit(i);
    f.s.fill(r, u, m);
    f.outputs(m, z);
    store_outputs(y.at(u.b, 0, u.head), y.row, y.head, f.y, f.s.decays.up.data(), r.x.at(u.b, 0, u.head), r.x.row, r.x.head,
                  D ? D + u.head * z.p : nullptr, u, z.l, z);
    if (final_state.defined()) f.final_state(final_state.data<A>() + (u.b * z.heads + u.head) * z.p * z.n, u, m, z);
  });
}

template <class T>
void square_backward(SsdGrad& grad, const Tensor& dy, const SsdInput& in) {
  using A = accum_t<T>;
  const Gradients<T> to(grad, dy, in);
  const Sizes<A>& z = to.z;
  const Lengths<A> m(z);
  for_each_piece<SquareBackward<A>>(z, [&](SquareBackward<A>& b, int64_t i, int64_t) {
    const Unit u = z.unit(i);
    const Chunk all{0, z.l, z.l, 0};
    b.s.fill(to.r, u, m);
    to.pack_outputs(b.v, b.s.decays, all, u, 0);
    b.input_gradients(m, z);
    to.inputs(b.du, b.s.decays, all, u, 0, 0);
    std::fill_n(b.gamma, m.rows * m.ls, A(0));
    for (int64_t h = 0; h < u.heads; ++h) {
      b.head(h, u, m, z);
      b.decay_sums(grad.da.data<A>() + u.b * z.l * z.heads + u.head + h, z.heads, m);
    }
    b.s.mask(b.gamma, m);
    for (const bool of_c : {false, true}) {
      b.group_gradient(of_c, m);
      for (int64_t t = 0; t < z.l; ++t) to.group_row(of_c ? 1 : 0, b.d + t * m.ns, u, t);
    }
  });
  to.sum_parts();
}

#define KRAIT_SQUARE(T)                                                        \
  template bool in_one_square<T>(const SsdInput&);                             \
  template void square_forward<T>(Tensor&, Tensor&, const SsdInput&);          \
  template void square_backward<T>(SsdGrad&, const Tensor&, const SsdInput&);
KRAIT_SQUARE(float)
KRAIT_SQUARE(double)
KRAIT_SQUARE(bf16)
#undef KRAIT_SQUARE

}  // namespace krait::kernels::cpu::ssd

#include <array>

#include "kernels/cpu/ssd_gradient.h"
#include "kernels/cpu/ssd_square.h"

namespace krait::kernels::cpu {

namespace ssd {
namespace {

// With v_i = e_i dy_i and R = e_q dh_out (ssd_chunk.h), for the heads together
//   du_j = sum_i G_ij v_i + B_j R       dh' = R + sum_i C_i (x) v_i
// and for each of them, because the decay's gradient wants their sums apart,
//   E_ij = v_i . u_j     W = E G     dC_i += h' v_i     dB_j += R u_j,
// while dC_i += sum_j E_ij B_j and dB_j += sum_i E_ij C_i take the sum of the heads' E.
template <class A>
struct BackwardScratch {
  Workspace<A> w;
  A *b_rows, *c_rows, *bt, *ct, *reach, *g, *gamma, *gamma_t, *weights, *u, *v, *du, *ut, *vt, *dbt, *dct, *rows, *upward, *factor;
  A *from_in, *from_out;
  Tensor states;  // before each chunk, as h'
  Decays<A> decays;
  explicit BackwardScratch(const Sizes<A>& z)
      : w(kChunk * (8 * z.np + 4 * kChunk + 3 * z.ws + 2 * round_up(z.p, kLanes<A>)) + z.state() + z.width + 4096),
        b_rows(w.take(kChunk * z.np)), c_rows(w.take(kChunk * z.np)), bt(w.take(kChunk * z.np)), ct(w.take(kChunk * z.np)),
        reach(w.take(kChunk * z.np)), g(w.take(kChunk * kChunk)), gamma(w.take(kChunk * kChunk)),
        gamma_t(w.take(kChunk * kChunk)), weights(w.take(kChunk * kChunk)), u(w.take(kChunk * z.ws)), v(w.take(kChunk * z.ws)),
        du(w.take(kChunk * z.ws)), ut(w.take(kChunk * round_up(z.p, kLanes<A>))), vt(w.take(kChunk * round_up(z.p, kLanes<A>))),
        dbt(w.take(kChunk * z.np)), dct(w.take(kChunk * z.np)), rows(w.take(kChunk * z.np)), upward(w.take(z.state())),
        factor(w.take(z.width)), from_in(w.take(kChunk)), from_out(w.take(kChunk)) {}
};

// Zero where j > i or j lies in another document than i.
template <class A>
void mask(A* square, const int32_t* segments, const Chunk& c) {
  for (int64_t i = 0, begin = 0; i < c.q; ++i) {
    if (!c.whole() && i > 0 && segments[i] != segments[i - 1]) begin = i;
    A* row = square + i * kChunk;
    std::fill(row, row + begin, A(0));
    std::fill(row + i + 1, row + kChunk, A(0));
  }
}

// g (i, j) = C_i . B_j, masked, and zero rows behind.
template <class A>
void masked_products(A* g, const A* ct, const A* bt, const int32_t* segments, const Chunk& c, const Sizes<A>& z) {
  chunk_products(g, ct, bt, c.q, z);
  mask(g, segments, c);
  std::fill(g + c.q * kChunk, g + kChunk * kChunk, A(0));
}

// to (columns, kChunk) = from (kChunk, columns) transposed, columns rounded up to whole vectors.
template <class A>
void transpose_head(A* to, const A* from, int64_t columns, const Sizes<A>& z) {
  transpose<A>(to, kChunk, from, z.ws, kChunk, round_up(columns, kLanes<A>));
}

// Columns [begin, end) of to (rows, kChunk) become 0.
template <class A>
void clear_columns(A* to, int64_t rows, int64_t begin, int64_t end) {
  for (int64_t c = 0; c < rows; ++c) std::fill(to + c * kChunk + begin, to + c * kChunk + end, A(0));
}

// da[r] = sum_{i >= r > j} W_ij, whose sums over i grow from the last row.
template <class A>
void decay_sums(A* da, int64_t stride, const A* weights, int64_t q) {
  static const auto ones = [] {
    std::array<A, 2 * kChunk> m{};
    std::fill_n(m.begin(), kChunk, A(1));
    return m;
  }();
  Vec<A> running[kChunk / kLanes<A>] = {};
  for (int64_t r = q - 1; r >= 0; --r) {
    Vec<A> sum{};
    for (int64_t v = 0; v < kChunk / kLanes<A>; ++v) {
      running[v] += load(weights + r * kChunk + v * kLanes<A>);
      sum += running[v] * load(ones.data() + kChunk - r + v * kLanes<A>);
    }
    da[r * stride] = total<A>(sum);
  }
}

template <class T>
class Backward {
  using A = accum_t<T>;
  using S = BackwardScratch<A>;

 public:
  Backward(SsdGrad& grad, const Tensor& dy, const Tensor& dfinal, const SsdInput& in)
      : to_(grad, dy, in), r_(to_.r), z_(to_.z) {
    Tensor* dinitial = grad.dinitial_state.defined() ? &grad.dinitial_state : nullptr;
    std::unique_ptr<PieceStates<T>> states, gradients;
    if (z_.pieces > 1) {
      states = std::make_unique<PieceStates<T>>(in, Tensor(), in.initial_state, nullptr);
      gradients = std::make_unique<PieceStates<T>>(in, dy, dfinal, dinitial);
    }
    for_each_piece<S>(z_, [&](S& s, int64_t unit, int64_t piece) {
      const Unit u = z_.unit(unit);
      r_.fill(s.decays, u, piece);
      make_states(s, u, piece, [&](A* to) { load_state(to, states.get(), in.initial_state, unit, piece, r_); });
      load_state(s.upward, gradients.get(), dfinal, unit, piece, r_);
      const auto chunks = static_cast<int64_t>(s.decays.chunks.size());
      spread<A>(s.factor, s.decays.out.data() + (chunks - 1) * u.heads, nullptr, u, z_);
      scale_state(s.upward, s.factor, z_);
      const bool keeps_first = dinitial && !gradients;
      for (int64_t k = chunks - 1; k >= 0; --k)
        chunk(s, u, piece, k, {.state = k == 0 && piece == 0 && !in.initial_state.defined(),
                               .upward = k == chunks - 1 && piece == z_.pieces - 1 && !dfinal.defined(),
                               .result = k == 0 && !keeps_first});
      if (keeps_first)
        get_state(dinitial->data<A>() + (u.b * z_.heads + u.head) * z_.p * z_.n, s.upward, u, z_);
    });
    to_.sum_parts();
  }

 private:
  template <class Load>
  void make_states(S& s, const Unit& u, int64_t piece, Load load_first) {
    const auto chunks = static_cast<int64_t>(s.decays.chunks.size());
    if (!s.states.defined() || s.states.numel() < chunks * z_.state()) s.states = zeros({chunks * z_.state()}, dtype_of<A>, kCpu);
    A* states = s.states.template data<A>();
    load_first(states);
    spread<A>(s.factor, s.decays.in.data(), nullptr, u, z_);
    scale_state(states, s.factor, z_);
    for (int64_t k = 0; k + 1 < chunks; ++k) {
      const Chunk& c = s.decays.chunks[static_cast<size_t>(k)];
      const int64_t t = piece * z_.piece + c.begin;
      A* state = states + k * z_.state();
      r_.pack_group(s.b_rows, r_.B, c, u, t);
      r_.pack_inputs(s.u, s.decays, c, u, t);
      spread(s.factor, s.decays.out.data() + k * u.heads, s.decays.in.data() + (k + 1) * u.heads, u, z_);
      update_state(state + z_.state(), c.whole() ? state : nullptr, s.b_rows + c.last * z_.np, s.u + c.last * z_.ws,
                   c.q - c.last, s.factor, z_);
    }
  }

  /// What is zero or not wanted, so that its products need not be made: the state before a chunk, the gradient of the
  /// state behind it, and the gradient of the one before it.
  struct Empty {
    bool state, upward, result;
  };

  void chunk(S& s, const Unit& u, int64_t piece, int64_t k, const Empty& empty) {
    const Chunk& c = s.decays.chunks[static_cast<size_t>(k)];
    const int64_t t = piece * z_.piece + c.begin, ws = z_.ws;
    const int32_t* segments = r_.segments ? r_.segments + u.b * z_.l + t : nullptr;
    r_.pack_group(s.b_rows, r_.B, c, u, t);
    r_.pack_group(s.c_rows, r_.C, c, u, t);
    transpose<A>(s.bt, kChunk, s.b_rows, z_.np, kChunk, z_.np);
    transpose<A>(s.ct, kChunk, s.c_rows, z_.np, kChunk, z_.np);
    masked_products(s.g, s.ct, s.bt, segments, c, z_);
    const A* reach = c.whole() || empty.upward ? s.bt : columns_from_to(s.reach, s.bt, c.last, c.q, z_);
    r_.pack_inputs(s.u, s.decays, c, u, t);
    to_.pack_outputs(s.v, s.decays, c, u, t);

    for (int64_t w = 0; w < z_.width; w += kTile<A>)
      for (int64_t j = 0; j < c.q; j += kStrip)
        multiply_tile<A, 2>(1, {reach + j, s.upward + w, empty.upward ? 0 : z_.n, kChunk, ws},
                            {s.g + j * kChunk + j, s.v + j * ws + w, c.q - j, kChunk, ws},
                            [&](int row, int v, Vec<A> sum) __attribute__((always_inline)) {
                              store(s.du + (j + row) * ws + w + v * kLanes<A>, sum);
                            });
    std::fill(s.gamma, s.gamma + kChunk * kChunk, A(0));
    std::fill(s.dbt, s.dbt + kChunk * z_.np, A(0));
    std::fill(s.dct, s.dct + kChunk * z_.np, A(0));
    for (int64_t h = 0; h < u.heads; ++h) head(s, u, c, k, t, h, empty);
    to_.inputs(s.du, s.decays, c, u, piece, t);

    mask(s.gamma, segments, c);
    transpose<A>(s.gamma_t, kChunk, s.gamma, kChunk, kChunk, kChunk);
    for (int64_t i = 0; i < kChunk; i += kTile<A>)
      for (int64_t n = 0; n < z_.n; n += kStrip) {
        const auto add_to = [&](A* to) {
          return [=](int row, int v, Vec<A> sum) __attribute__((always_inline)) {
            A* at = to + (n + row) * kChunk + i + v * kLanes<A>;
            store(at, load(at) + sum);
          };
        };
        multiply_columns<A>(s.b_rows + n, z_.np, s.gamma_t + i, kChunk, std::min(c.q, i + kTile<A>), add_to(s.dct));
        multiply_columns<A>(s.c_rows + i * z_.np + n, z_.np, s.gamma + i * kChunk + i, kChunk, c.q - i, add_to(s.dbt));
      }
    put_group(s, s.dbt, 0, u, c, t);
    put_group(s, s.dct, 1, u, c, t);

    if (empty.result) return;
    spread(s.factor, s.decays.in.data() + k * u.heads, k > 0 ? s.decays.out.data() + (k - 1) * u.heads : nullptr, u, z_);
    update_state(s.upward, c.whole() && !empty.upward ? s.upward : nullptr, s.c_rows, s.v, c.first, s.factor, z_);
  }

  void head(S& s, const Unit& u, const Chunk& c, int64_t k, int64_t t, int64_t h, const Empty& empty) {
    const A *state = s.states.template data<A>() + k * z_.state() + h * z_.p, *upward = s.upward + h * z_.p;
    transpose_head(s.ut, s.u + h * z_.p, z_.p, z_);
    transpose_head(s.vt, s.v + h * z_.p, z_.p, z_);
    // What lies above the diagonal in whole blocks is not made: it stays 0.
    for (int64_t j = 0; j < kChunk; j += kTile<A>)
      for (int64_t i = j; i < c.q; i += kStrip)
        multiply_rows<A>(s.v + i * z_.ws + h * z_.p, z_.ws, s.ut + j, kChunk, z_.p, [&](int row, int v, Vec<A> sum) __attribute__((always_inline)) {
          const int64_t at = (i + row) * kChunk + j + v * kLanes<A>;
          store(s.weights + at, sum * load(s.g + at));
          store(s.gamma + at, load(s.gamma + at) + sum);
        });
    A* da = to_.grad.da.template data<A>() + (u.b * z_.l + t) * z_.heads + u.head + h;
    decay_sums(da, z_.heads, s.weights, c.q);

    // Inputs before `last` do not reach the state behind the chunk, outputs from `first` on do not see the one before it.
    if (!c.whole()) {
      clear_columns(s.ut, z_.p, 0, c.last);
      clear_columns(s.vt, z_.p, c.first, c.q);
    }
    to_states(s.dbt, s.from_out, empty.upward ? nullptr : upward, s.ut, s.bt);
    to_states(s.dct, s.from_in, empty.state ? nullptr : state, s.vt, s.ct);
    // The rest of da: outputs from r on that read the state before the chunk, inputs before r, the state itself.
    A through = c.whole() && !empty.state && !empty.upward ? product(state, upward) : A(0), later = 0;
    for (int64_t r = 0; r < c.q; ++r) {
      da[r * z_.heads] += through;
      through += s.from_out[r];
    }
    for (int64_t r = c.q - 1; r >= 0; --r) {
      later += s.from_in[r];
      da[r * z_.heads] += later;
    }
  }

  // d (n, kChunk) += state others, and dots[i] = sum_n (state others)_ni rows_ni; a null state is zero.
  void to_states(A* d, A* dots, const A* state, const A* others, const A* rows) const {
    if (!state) return std::fill_n(dots, kChunk, A(0)), void();
    for (int64_t i = 0; i < kChunk; i += kTile<A>) {
      Vec<A> dot[2] = {};
      for (int64_t n = 0; n < z_.n; n += kStrip)
        multiply_rows<A>(state + n * z_.ws, z_.ws, others + i, kChunk, z_.p, [&](int row, int v, Vec<A> sum) __attribute__((always_inline)) {
          const int64_t at = (n + row) * kChunk + i + v * kLanes<A>;
          store(d + at, load(d + at) + sum);
          dot[v] += sum * load(rows + at);
        });
      store(dots + i, dot[0]);
      store(dots + i + kLanes<A>, dot[1]);
    }
  }

  A product(const A* state, const A* upward) const {
    A sum = 0;
    for (int64_t n = 0; n < z_.n; ++n) {
      const A *__restrict x = state + n * z_.ws, *__restrict y = upward + n * z_.ws;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < z_.p; ++c) sum += x[c] * y[c];
    }
    return sum;
  }

  // Rows of dB (0) or dC (1).
  void put_group(S& s, const A* d, int64_t which, const Unit& u, const Chunk& c, int64_t t) const {
    transpose<A>(s.rows, z_.np, d, kChunk, z_.np, kChunk);
    for (int64_t i = 0; i < c.q; ++i) to_.group_row(which, s.rows + i * z_.np, u, t + i);
  }

  const Gradients<T> to_;
  const Reader<T>& r_;
  const Sizes<A>& z_;
};

}  // namespace
}  // namespace ssd

void ssd_backward(SsdGrad& grad, const Tensor& dy, const Tensor& dfinal, const SsdInput& in) {
  visit_float(in.x.dtype(), [&]<class T>() {
    if (!dfinal.defined() && ssd::in_one_square<T>(in)) return ssd::square_backward<T>(grad, dy, in);
    ssd::Backward<T>(grad, dy, dfinal, in);
  });
}

}  // namespace krait::kernels::cpu

#include "kernels/cpu/ssd_chunk.h"
#include "kernels/cpu/ssd_square.h"

namespace krait::kernels::cpu {

namespace ssd {
namespace {

template <class A>
struct ForwardScratch {
  Workspace<A> w;
  A *b_rows, *c_rows, *bt, *ct, *seen, *gt, *u, *y, *state, *factor;
  Decays<A> decays;
  explicit ForwardScratch(const Sizes<A>& z)
      : w(kChunk * (5 * z.np + kChunk + 2 * z.ws) + z.state() + z.width + 1024), b_rows(w.take(kChunk * z.np)),
        c_rows(w.take(kChunk * z.np)), bt(w.take(kChunk * z.np)), ct(w.take(kChunk * z.np)), seen(w.take(kChunk * z.np)),
        gt(w.take(kChunk * kChunk)), u(w.take(kChunk * z.ws)), y(w.take(kChunk * z.ws)), state(w.take(z.state())),
        factor(w.take(z.width)) {}
};

// gt (j, i) = B_j . C_i for i >= j of j's document, else 0.
template <class A>
void masked_products(A* gt, const A* bt, const A* ct, const int32_t* segments, const Chunk& c, const Sizes<A>& z) {
  chunk_products(gt, bt, ct, c.q, z);
  for (int64_t j = 0, end = 0; j < c.q; ++j) {
    if (end == j)
      for (end = j + 1; end < c.q && (c.whole() || segments[end] == segments[j]);) ++end;
    std::fill(gt + j * kChunk, gt + j * kChunk + j, A(0));
    std::fill(gt + j * kChunk + end, gt + (j + 1) * kChunk, A(0));
  }
}

template <class T>
class Forward {
  using A = accum_t<T>;
  using S = ForwardScratch<A>;

 public:
  Forward(Tensor& y, Tensor& final_state, const SsdInput& in)
      : r_(in), z_(r_.z), y_(y), D_(in.D.defined() ? in.D.data<A>() : nullptr) {
    std::unique_ptr<PieceStates<T>> pieces;
    if (z_.pieces > 1) pieces = std::make_unique<PieceStates<T>>(in, Tensor(), in.initial_state, final_state.defined() ? &final_state : nullptr);
    const bool keep = !pieces && final_state.defined();
    for_each_piece<S>(z_, [&](S& s, int64_t unit, int64_t piece) {
      const Unit u = z_.unit(unit);
      r_.fill(s.decays, u, piece);
      load_state(s.state, pieces.get(), in.initial_state, unit, piece, r_);
      spread<A>(s.factor, s.decays.in.data(), nullptr, u, z_);
      scale_state(s.state, s.factor, z_);
      const bool starts_empty = piece == 0 && !in.initial_state.defined();
      for (size_t k = 0; k < s.decays.chunks.size(); ++k) chunk(s, u, piece, k, starts_empty && k == 0, keep);
      if (keep) get_state(final_state.data<A>() + (u.b * z_.heads + u.head) * z_.p * z_.n, s.state, u, z_);
    });
  }

 private:
  // `empty`: the state before the chunk is zero and counts for nothing. `keep`: that behind the last one is wanted.
  void chunk(S& s, const Unit& u, int64_t piece, size_t k, bool empty, bool keep) {
    const Chunk& c = s.decays.chunks[k];
    const int64_t t = piece * z_.piece + c.begin, heads = u.heads, ws = z_.ws;
    r_.pack_group(s.b_rows, r_.B, c, u, t);
    r_.pack_group(s.c_rows, r_.C, c, u, t);
    transpose<A>(s.bt, kChunk, s.b_rows, z_.np, kChunk, z_.np);
    transpose<A>(s.ct, kChunk, s.c_rows, z_.np, kChunk, z_.np);
    masked_products(s.gt, s.bt, s.ct, r_.segments ? r_.segments + u.b * z_.l + t : nullptr, c, z_);
    const A* seen = s.ct;
    if (!c.whole() && !empty) seen = columns_from_to(s.seen, s.ct, 0, c.first, z_);
    r_.pack_inputs(s.u, s.decays, c, u, t);
    for (int64_t w = 0; w < z_.width; w += kTile<A>)
      for (int64_t i = 0; i < c.q; i += kStrip)
        multiply_tile<A, 2>(1, {seen + i, s.state + w, empty ? 0 : z_.n, kChunk, ws},
                            {s.gt + i, s.u + w, std::min(c.q, i + kStrip), kChunk, ws},
                            [&](int row, int v, Vec<A> sum) __attribute__((always_inline)) {
                              store(s.y + (i + row) * ws + w + v * kLanes<A>, sum);
                            });
    store_outputs(y_.at(u.b, t, u.head), y_.row, y_.head, s.y, s.decays.up.data() + c.begin * heads, r_.x.at(u.b, t, u.head),
                  r_.x.row, r_.x.head, D_ ? D_ + u.head * z_.p : nullptr, u, c.q, z_);
    const bool last = k + 1 == s.decays.chunks.size();
    if (last && !keep) return;
    const A* exit = s.decays.out.data() + static_cast<int64_t>(k) * heads;
    spread(s.factor, exit, last ? nullptr : s.decays.in.data() + static_cast<int64_t>(k + 1) * heads, u, z_);
    update_state(s.state, c.whole() && !empty ? s.state : nullptr, s.b_rows + c.last * z_.np, s.u + c.last * ws, c.q - c.last, s.factor, z_);
  }

  Reader<T> r_;
  const Sizes<A>& z_;
  View<T> y_;
  const A* D_;
};

}  // namespace
}  // namespace ssd

void ssd_forward(Tensor& y, Tensor& final_state, const SsdInput& in) {
  visit_float(in.x.dtype(), [&]<class T>() {
    if (ssd::in_one_square<T>(in)) return ssd::square_forward<T>(y, final_state, in);
    ssd::Forward<T>(y, final_state, in);
  });
}

void ssd_step(Tensor& y_out, Tensor& state_out, const Tensor& x_in, const Tensor& dt_in, const Tensor& a_in,
              const Tensor& B_in, const Tensor& C_in, const Tensor& D_in) {
  visit_float(x_in.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const int64_t heads = x_in.size(1), p = x_in.size(2), g = B_in.size(1), n = B_in.size(2);
    const A* dt = dt_in.defined() ? dt_in.data<A>() : nullptr;
    const A* a = a_in.data<A>();
    const A* D = D_in.defined() ? D_in.data<A>() : nullptr;
    T* y = y_out.data<T>();
    A* states = state_out.data<A>();
    const T *x = x_in.data<T>(), *B = B_in.data<T>(), *C = C_in.data<T>();
    parallel_for(0, x_in.size(0) * heads, std::max<int64_t>(1, 16384 / (p * n)), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t h = i % heads, group = i / heads * g + h / (heads / g);
        const A decay = vexp(a[i]), step = dt ? dt[i] : A(1);
        const T *Bg = B + group * n, *Cg = C + group * n;
        for (int64_t k = 0; k < p; ++k) {
          A* __restrict s = states + (i * p + k) * n;
          const A value = static_cast<A>(x[i * p + k]), in = step * value;
          A sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t c = 0; c < n; ++c) {
            s[c] = decay * s[c] + in * static_cast<A>(Bg[c]);
            sum += s[c] * static_cast<A>(Cg[c]);
          }
          put(y[i * p + k], sum + (D ? D[h * p + k] * value : A(0)));
        }
      }
    });
  });
}

}  // namespace krait::kernels::cpu

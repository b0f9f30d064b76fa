#include "kernels/cpu/ssd_chunk.h"

namespace krait::kernels::cpu {

namespace ssd {

namespace {

template <class A>
struct SummaryScratch {
  Workspace<A> w;
  A *rows, *others, *factor;
  Decays<A> decays;
  explicit SummaryScratch(const Sizes<A>& z)
      : w(kChunk * (z.np + z.ws) + z.width), rows(w.take(kChunk * z.np)), others(w.take(kChunk * z.ws)), factor(w.take(z.width)) {}
};

// The running state of a unit goes through its pieces in order (or back): each piece's own part is replaced by what
// arrives there.
template <class A>
void carry(A* parts, const A* totals, const A* start, A* end, bool backwards, const Unit& u, const Sizes<A>& z) {
  std::vector<A> state(static_cast<size_t>(z.state())), total(static_cast<size_t>(z.width));
  if (start) put_state(state.data(), start, u, z);
  for (int64_t step = 0; step < z.pieces; ++step) {
    const int64_t piece = backwards ? z.pieces - 1 - step : step;
    spread<A>(total.data(), totals + piece * z.block, nullptr, u, z);
    for (int64_t n = 0; n < z.n; ++n) {
      A *__restrict running = state.data() + n * z.ws, *__restrict own = parts + piece * z.state() + n * z.ws;
#pragma omp simd
      for (int64_t c = 0; c < z.width; ++c) {
        const A arriving = running[c];
        running[c] = total[static_cast<size_t>(c)] * arriving + own[c];
        own[c] = arriving;
      }
    }
  }
  if (end) get_state(end, state.data(), u, z);
}

}  // namespace

// Each piece's own contribution in parallel, then a pass over the pieces of every unit.
template <class T>
PieceStates<T>::PieceStates(const SsdInput& in, const Tensor& dy_in, const Tensor& start, Tensor* end) {
  const Reader<T> r(in);
  const Sizes<A>& z = r.z;
  const bool backwards = dy_in.defined();
  const View<const T> dy = backwards ? View<const T>(dy_in) : View<const T>();
  arriving = zeros({z.units, z.pieces, z.state()}, dtype_of<A>, kCpu);
  const Tensor totals = empty({z.units, z.pieces, z.block}, dtype_of<A>, kCpu);
  A *parts = arriving.data<A>(), *total = totals.data<A>();
  for_each_piece<SummaryScratch<A>>(z, [&](SummaryScratch<A>& s, int64_t unit, int64_t piece) {
    const Unit u = z.unit(unit);
    r.fill(s.decays, u, piece);
    A *state = parts + (unit * z.pieces + piece) * z.state(), *product = total + (unit * z.pieces + piece) * z.block;
    std::fill_n(product, z.block, A(1));
    const auto chunks = static_cast<int64_t>(s.decays.chunks.size());
    for (int64_t step = 0; step < chunks; ++step) {
      const int64_t k = backwards ? chunks - 1 - step : step, next = backwards ? k - 1 : k + 1;
      const Chunk& c = s.decays.chunks[static_cast<size_t>(k)];
      const int64_t t = piece * z.piece + c.begin;
      const A *entry = s.decays.in.data() + k * u.heads, *exit = s.decays.out.data() + k * u.heads;
      for (int64_t h = 0; h < u.heads; ++h) product[h] *= c.whole() ? entry[h] * exit[h] : A(0);
      const bool last = step == chunks - 1;
      const A* from = c.whole() ? state : nullptr;
      if (backwards) {
        spread(s.factor, entry, last ? nullptr : s.decays.out.data() + next * u.heads, u, z);
        r.pack_group(s.rows, r.C, c, u, t);
        pack_scaled<A>(s.others, dy.at(u.b, t, u.head), dy.row, dy.head, s.decays.up.data() + c.begin * u.heads, nullptr, 0, u, c.q, z);
        update_state(state, from, s.rows, s.others, c.first, s.factor, z);
      } else {
        spread(s.factor, exit, last ? nullptr : s.decays.in.data() + next * u.heads, u, z);
        r.pack_group(s.rows, r.B, c, u, t);
        r.pack_inputs(s.others, s.decays, c, u, t);
        update_state(state, from, s.rows + c.last * z.np, s.others + c.last * z.ws, c.q - c.last, s.factor, z);
      }
    }
  });
  parallel_for(0, z.units, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Unit u = z.unit(i);
      A* to = end ? end->data<A>() + (u.b * z.heads + u.head) * z.p * z.n : nullptr;
      carry(parts + i * z.pieces * z.state(), total + i * z.pieces * z.block, r.start_of(start, u), to, backwards, u, z);
    }
  });
}

template struct PieceStates<float>;
template struct PieceStates<double>;
template struct PieceStates<bf16>;

}  // namespace ssd

void ssd_final_state(Tensor& state, const SsdInput& in) {
  visit_float(in.x.dtype(), [&]<class T>() { ssd::PieceStates<T>(in, {}, in.initial_state, &state); });
}

void ssd_initial_gradient(Tensor& gradient, const Tensor& dy, const SsdInput& in) {
  visit_float(in.x.dtype(), [&]<class T>() { ssd::PieceStates<T>(in, dy, {}, &gradient); });
}

}  // namespace krait::kernels::cpu

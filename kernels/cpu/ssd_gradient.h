#pragma once
// What the forms of the backward (ssd_backward.cpp, ssd_square.cpp) have in common: where gradients go, and sums over what
// is computed apart.
#include "kernels/cpu/ssd_chunk.h"

namespace krait::kernels::cpu::ssd {

/// dx = f du + D dy of one position and head; dD += dy x; returns du . x.
template <class T, class A, class P>
[[gnu::always_inline]] inline A finish_row(T* __restrict dx, A* __restrict dD, const A* __restrict du, const T* __restrict x,
                                           const T* __restrict dy, const A* __restrict D, A f, P p) {
  A sum = 0;
  if (D) {
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < p; ++c) {
      const A value = static_cast<A>(x[c]), up = static_cast<A>(dy[c]);
      sum += du[c] * value;
      put(dx[c], f * du[c] + D[c] * up);
      dD[c] += up * value;
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < p; ++c) {
      sum += du[c] * static_cast<A>(x[c]);
      put(dx[c], f * du[c]);
    }
  }
  return sum;
}

template <class T, class A>
inline void put_row(T* __restrict to, const A* __restrict from, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) put(to[i], from[i]);
}

template <class T>
struct Gradients {
  using A = accum_t<T>;

  Gradients(SsdGrad& to, const Tensor& dy_in, const SsdInput& in)
      : grad(to), r(in), z(r.z), dy(dy_in), dx(to.dx), dB(to.dB), dC(to.dC), D(in.D.defined() ? in.D.data<A>() : nullptr) {
    if (D) partial_D = zeros({z.b * z.pieces, z.heads, z.p}, dtype_of<A>, kCpu);
    if (z.blocks > 1) partial = empty({2, z.blocks, z.b, z.l, z.g, z.n}, dtype_of<A>, kCpu);
  }

  /// v_i = e_i dy_i of the positions from t on.
  void pack_outputs(A* v, const Decays<A>& decays, const Chunk& c, const Unit& u, int64_t t) const {
    pack_scaled<A>(v, dy.at(u.b, t, u.head), dy.row, dy.head, decays.up.data() + c.begin * u.heads, nullptr, 0, u, c.q, z);
  }

  /// dx, ddt and the part of dD from du (q, ws) of the positions from t on, the piece's from c.begin on.
  void inputs(const A* du, const Decays<A>& decays, const Chunk& c, const Unit& u, int64_t piece, int64_t t) const {
    A *ddt = r.dt ? grad.ddt.template data<A>() : nullptr, *dD = D ? partial_D.template data<A>() : nullptr;
    with_head_dim(z.p, [&](auto p) __attribute__((always_inline)) {
      for (int64_t j = 0; j < c.q; ++j)
        for (int64_t h = 0; h < u.heads; ++h) {
          const int64_t head = u.head + h, at = (u.b * z.l + t + j) * z.heads + head;
          const A down = decays.down[static_cast<size_t>((c.begin + j) * u.heads + h)];
          const A du_x = finish_row(dx.at(u.b, t + j, head), dD ? dD + ((u.b * z.pieces + piece) * z.heads + head) * p : nullptr,
                                    du + j * z.ws + h * p, r.x.at(u.b, t + j, head), dy.at(u.b, t + j, head),
                                    D ? D + head * p : nullptr, r.dt ? down * r.dt[at] : down, p);
          if (ddt) ddt[at] = down * du_x;
        }
    });
  }

  /// A row of dB (0) or dC (1): to the result, or to this block's part of it.
  void group_row(int64_t which, const A* row, const Unit& u, int64_t t) const {
    if (z.blocks == 1)
      put_row((which == 0 ? dB : dC).at(u.b, t, u.group), row, z.n);
    else
      std::copy_n(row, z.n, partial.template data<A>() + ((((which * z.blocks + u.block) * z.b + u.b) * z.l + t) * z.g + u.group) * z.n);
  }

  /// When all units are done.
  void sum_parts() const {
    if (D) sum_D();
    if (z.blocks > 1) sum_blocks();
  }

  SsdGrad& grad;
  Reader<T> r;
  const Sizes<A>& z;
  View<const T> dy;
  View<T> dx, dB, dC;
  const A* D;

 private:
  void sum_D() const {
    A* dD = grad.dD.template data<A>();
    const A* parts = partial_D.template data<A>();
    const int64_t n = z.heads * z.p;
    std::fill(dD, dD + n, A(0));
    for (int64_t k = 0; k < z.b * z.pieces; ++k) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) dD[i] += parts[k * n + i];
    }
  }

  void sum_blocks() const {
    const int64_t all = z.b * z.l * z.g * z.n;
    parallel_for(0, z.b * z.l, 64, [&](int64_t first, int64_t last) {
      std::vector<A> row(static_cast<size_t>(z.n));
      for (int64_t which = 0; which < 2; ++which)
        for (int64_t i = first * z.g; i < last * z.g; ++i) {
          const A* from = partial.template data<A>() + which * z.blocks * all + i * z.n;
          A* __restrict sum = row.data();
          std::copy_n(from, z.n, sum);
          for (int64_t k = 1; k < z.blocks; ++k) {
#pragma omp simd
            for (int64_t n = 0; n < z.n; ++n) sum[n] += from[k * all + n];
          }
          put_row((which == 0 ? dB : dC).at(i / z.g / z.l, i / z.g % z.l, i % z.g), sum, z.n);
        }
    });
  }

  Tensor partial_D, partial;
};

}  // namespace krait::kernels::cpu::ssd

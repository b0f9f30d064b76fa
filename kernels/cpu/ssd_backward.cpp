#include "kernels/cpu/ssd_chunk.h"

namespace krait::kernels::cpu {

namespace ssd {
namespace {

template <class A>
struct BackwardScratch {
  Workspace<A> w;
  A *b_rows, *c_rows, *ct, *gt, *m, *et, *x, *xw, *dy, *dyw, *dyt, *u, *state_t, *dstate_t, *wide, *dB, *dC, *gamma;
  A *running, *da, *from_in, *from_out, *steps, *weights;
  Decay<A> decay;
  explicit BackwardScratch(const Sizes<A>& z)
      : w(z.qp * (6 * z.np + 4 * z.qp + 6 * z.pp) + 2 * z.state() + 6 * (z.qp + 64) + 2048 + Decay<A>::values(z.qp)),
        b_rows(w.take(z.qp * z.np)), c_rows(w.take(z.qp * z.np)), ct(w.take(z.qp * z.np)), gt(w.take(z.qp * z.qp)),
        m(w.take(z.qp * z.qp)), et(w.take(z.qp * z.qp)), x(w.take(z.qp * z.pp)), xw(w.take(z.qp * z.pp)),
        dy(w.take(z.qp * z.pp)), dyw(w.take(z.qp * z.pp)), dyt(w.take(z.qp * z.pp)), u(w.take(z.qp * z.pp)),
        state_t(w.take(z.state())), dstate_t(w.take(z.state())), wide(w.take(z.qp * z.np)), dB(w.take(z.qp * z.np)),
        dC(w.take(z.qp * z.np)), gamma(w.take(z.qp * z.qp)), running(w.take(z.qp)), da(w.take(z.qp + 1)), from_in(w.take(z.qp)),
        from_out(w.take(z.qp)), steps(w.take(z.qp)), weights(w.take(z.qp)), decay(w, z.qp) {}
};

template <class A>
inline A dot(const A* __restrict a, const A* __restrict b, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// Row j: m = M, e = dy_i . x_j  ->  m = M (C_i . B_j), e = Gamma; total += Gamma.
template <class A>
inline void weigh_row(A* __restrict m, A* __restrict e, A* __restrict total, const A* __restrict g, A dt, int64_t from,
                      int64_t to) {
#pragma omp simd
  for (int64_t i = from; i < to; ++i) {
    e[i] *= m[i] * dt;
    total[i] += e[i];
    m[i] *= g[i];
  }
}

// running_i = sum_{j < r} W_ij grows row by row; returns da_r = sum_{i >= r} running_i for r = j + 1.
template <class A>
inline A decay_row(A* __restrict running, const A* __restrict gamma, const A* __restrict g, int64_t from, int64_t to) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = from; i < to; ++i) {
    running[i] += gamma[i] * g[i];
    sum += running[i];
  }
  return sum;
}

template <class A>
inline void add_rows(A* __restrict to, const A* __restrict from, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

template <class T, class A>
inline void put_rows(T* to, int64_t to_row, const A* from, int64_t rows, int64_t d, int64_t from_row) {
  for (int64_t i = 0; i < rows; ++i) {
    T* __restrict out = to + i * to_row;
    const A* __restrict in = from + i * from_row;
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) put(out[c], in[c]);
  }
}

// dx = dt u + D dy of one row; dD += dy x; returns u . x = ddt.
template <class T, class A>
inline A finish_row(T* __restrict dx, A* __restrict dD, const A* __restrict u, const A* __restrict x,
                    const A* __restrict dy, const A* __restrict D, A dt, int64_t p) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < p; ++c) sum += u[c] * x[c];
  if (D) {
#pragma omp simd
    for (int64_t c = 0; c < p; ++c) {
      put(dx[c], dt * u[c] + D[c] * dy[c]);
      dD[c] += dy[c] * x[c];
    }
  } else {
#pragma omp simd
    for (int64_t c = 0; c < p; ++c) put(dx[c], dt * u[c]);
  }
  return sum;
}

template <class T>
class Backward {
  using A = accum_t<T>;
  using S = BackwardScratch<A>;

 public:
  Backward(SsdGrad& grad, const Tensor& dy, const Tensor& dfinal, const SsdInput& in)
      : grad_(grad), in_(in), z_(in), x_(in.x), B_(in.B), C_(in.C), dy_(dy), dx_(grad.dx), dB_(grad.dB), dC_(grad.dC),
        states_(in, nullptr), dstates_(in, dy, dfinal, grad.dinitial_state.defined() ? &grad.dinitial_state : nullptr),
        partial_D_(in.D.defined() ? zeros({z_.b * z_.chunks, z_.heads, z_.p}, dtype_of<A>, kCpu) : Tensor()),
        a_(in.a.data<A>()), dt_(in.dt.defined() ? in.dt.data<A>() : nullptr),
        segments_(in.segments.defined() ? in.segments.data<int32_t>() : nullptr) {
    for_each_unit<A>(z_, [&] { return S(z_); }, [&](S& s, int64_t b, int64_t c, int64_t g, int64_t t0, int64_t q) {
      unit(s, b, c, g, t0, q);
    });
    if (in.D.defined()) sum_D();
  }

 private:
  int64_t state_at(int64_t b, int64_t c, int64_t h) const { return (b * z_.chunks + c) * z_.heads + h; }
  void fill(Decay<A>& decay, int64_t b, int64_t t0, int64_t h, int64_t q) const {
    decay.fill(a_ + (b * z_.l + t0) * z_.heads + h, z_.heads, segments_ ? segments_ + b * z_.l + t0 : nullptr, t0 == 0, q);
  }

  void unit(S& s, int64_t b, int64_t c, int64_t g, int64_t t0, int64_t q) {
    pack_rows<A>(s.b_rows, z_.np, B_.at(b, t0, g), B_.row, q, z_.n, z_.qp);
    pack_rows<A>(s.c_rows, z_.np, C_.at(b, t0, g), C_.row, q, z_.n, z_.qp);
    transpose<A>(s.ct, z_.qp, s.c_rows, z_.np, z_.qp, z_.np);
    products_of_group(s.gt, s.b_rows, s.ct, q, z_.qp, z_.n, z_.np);
    std::fill(s.dB, s.dB + z_.qp * z_.np, A(0));
    std::fill(s.dC, s.dC + z_.qp * z_.np, A(0));
    std::fill(s.gamma, s.gamma + z_.qp * z_.qp, A(0));
    for (int64_t h = g * z_.group; h < (g + 1) * z_.group; ++h) head(s, b, c, h, t0, q);
    // The heads share B and C, so their Gamma are summed before the products: dC_i += sum_j Gamma_ij B_j and
    // dB_j += sum_i Gamma_ij C_i.
    for (int64_t i = 0; i < q; i += kStrip)
      multiply_strip<A>(s.dC + i * z_.np, z_.np, s.gamma + i, 1, z_.qp, s.b_rows, z_.np, z_.np, std::min(q, i + kStrip), true);
    for (int64_t j = 0; j < q; j += kStrip) {
      const int64_t from = first_column<A>(j);
      multiply_strip<A>(s.dB + j * z_.np, z_.np, s.gamma + j * z_.qp + from, z_.qp, 1, s.c_rows + from * z_.np, z_.np,
                        z_.np, q - from, true);
    }
    put_rows(dB_.at(b, t0, g), dB_.row, s.dB, q, z_.n, z_.np);
    put_rows(dC_.at(b, t0, g), dC_.row, s.dC, q, z_.n, z_.np);
  }

  void head(S& s, int64_t b, int64_t c, int64_t h, int64_t t0, int64_t q) {
    const int64_t np = z_.np, pp = z_.pp, qp = z_.qp, at = (b * z_.l + t0) * z_.heads + h;
    fill(s.decay, b, t0, h, q);
    for (int64_t j = 0; j < q; ++j) {
      s.steps[j] = dt_ ? dt_[at + j * z_.heads] : A(1);
      s.weights[j] = s.steps[j] * s.decay.out[j];
    }
    pack_rows<A>(s.x, pp, x_.at(b, t0, h), x_.row, q, z_.p, qp);
    pack_rows<A>(s.dy, pp, dy_.at(b, t0, h), dy_.row, q, z_.p, qp);
    transpose<A>(s.dyt, qp, s.dy, pp, qp, pp);
    scale_rows(s.xw, s.x, s.weights, q, pp);
    scale_rows(s.dyw, s.dy, s.decay.in, q, pp);
    const A* state = states_.before.template data<A>() + state_at(b, c, h) * z_.state();
    const A* dstate = dstates_.behind.template data<A>() + state_at(b, c, h) * z_.state();
    transpose<A>(s.state_t, np, state, pp, np, pp);
    transpose<A>(s.dstate_t, np, dstate, pp, np, pp);

    // Gamma^T, (M C B^T)^T and the part of da inside the chunk.
    products_of_group(s.et, s.x, s.dyt, q, qp, z_.p, pp);
    std::fill(s.running, s.running + qp, A(0));
    s.da[0] = 0;
    for (int64_t j = 0; j < q; ++j) {
      const int64_t from = first_column<A>(j), end = s.decay.end[static_cast<size_t>(j)];
      A *m = s.m + j * qp, *e = s.et + j * qp, *gt = s.gt + j * qp;
      mask_row(m, s.decay.high, s.decay.low, j, end, from, qp);
      weigh_row(m, e, s.gamma + j * qp, gt, s.steps[j], from, qp);
      s.da[j + 1] = decay_row(s.running, e, gt, j + 1, q);
    }

    // dC_i += e^{s_i} dy_i h_in;  dB_j += e^{s_q - s_j} dt_j x_j dh_out.
    for (int64_t i = 0; i < q; i += kStrip) {
      A* out = s.wide + i * np;
      multiply_strip<A>(out, np, s.dyw + i * pp, pp, 1, s.state_t, np, np, z_.p, false);
      for (int64_t r = i; r < std::min(q, i + kStrip); ++r) s.from_in[r] = dot(s.wide + r * np, s.c_rows + r * np, z_.n);
      add_rows(s.dC + i * np, out, kStrip * np);
    }
    for (int64_t j = 0; j < q; j += kStrip)
      multiply_strip<A>(s.dB + j * np, np, s.xw + j * pp, pp, 1, s.dstate_t, np, np, z_.p, true);
    // U_j = e^{s_q - s_j} dh_out B_j + sum_i M_ij (C_i . B_j) dy_i
    for (int64_t j = 0; j < q; j += kStrip) {
      const int64_t from = first_column<A>(j), rows = std::min<int64_t>(kStrip, q - j);
      A* out = s.u + j * pp;
      multiply_strip<A>(out, pp, s.b_rows + j * np, np, 1, dstate, pp, pp, z_.n, false);
      for (int64_t r = j; r < j + rows; ++r) s.from_out[r] = dot(s.u + r * pp, s.xw + r * pp, pp);
      scale_rows(out, out, s.decay.out + j, rows, pp);
      multiply_strip<A>(out, pp, s.m + j * qp + from, qp, 1, s.dy + from * pp, pp, pp, q - from, true);
    }

    const A* D = in_.D.defined() ? in_.D.template data<A>() + h * z_.p : nullptr;
    A* dD = D ? partial_D_.template data<A>() + state_at(b, c, h) * z_.p : nullptr;
    A* ddt = dt_ ? grad_.ddt.template data<A>() + at : nullptr;
    T* dx = dx_.at(b, t0, h);
    for (int64_t j = 0; j < q; ++j) {
      const A u_x = finish_row(dx + j * dx_.row, dD, s.u + j * pp, s.x + j * pp, s.dy + j * pp, D, s.steps[j], z_.p);
      if (ddt) ddt[j * z_.heads] = u_x;
    }
    // The rest of da: outputs after r that read the state before the chunk, inputs before r, the state itself.
    A through = s.decay.total == A(0) ? A(0) : s.decay.total * dot(state, dstate, z_.n * pp);
    for (int64_t r = 0; r < q; ++r) {
      s.da[r] += through;
      through += s.from_out[r];
    }
    A later = 0;
    A* da = grad_.da.template data<A>() + at;
    for (int64_t r = q - 1; r >= 0; --r) {
      later += s.from_in[r];
      da[r * z_.heads] = s.da[r] + later;
    }
  }

  void sum_D() {
    A* dD = grad_.dD.template data<A>();
    const A* partial = partial_D_.template data<A>();
    const int64_t n = z_.heads * z_.p;
    std::fill(dD, dD + n, A(0));
    for (int64_t k = 0; k < z_.b * z_.chunks; ++k) add_rows(dD, partial + k * n, n);
  }

  SsdGrad& grad_;
  const SsdInput& in_;
  Sizes<A> z_;
  View<const T> x_, B_, C_, dy_;
  View<T> dx_, dB_, dC_;
  States<T> states_;
  StateGradients<T> dstates_;
  Tensor partial_D_;
  const A *a_, *dt_;
  const int32_t* segments_;
};

}  // namespace
}  // namespace ssd

void ssd_backward(SsdGrad& grad, const Tensor& dy, const Tensor& dfinal, const SsdInput& in) {
  visit_float(in.x.dtype(), [&]<class T>() { ssd::Backward<T>(grad, dy, dfinal, in); });
}

}  // namespace krait::kernels::cpu

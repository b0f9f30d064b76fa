#include "kernels/cpu/ssd_chunk.h"

namespace krait::kernels::cpu {

namespace ssd {

// Each chunk's own contribution in parallel, then a pass over the chunks of every head.
template <class T>
States<T>::States(const SsdInput& in, Tensor* final_state) {
  const Sizes<A> z(in);
  before = empty(z.states(), dtype_of<A>, kCpu);
  totals = empty({z.b, z.chunks, z.heads}, dtype_of<A>, kCpu);
  const View<const T> x(in.x), B(in.B);
  A* states = before.data<A>();
  A* total = totals.data<A>();
  const A* a = in.a.data<A>();
  const A* dt = in.dt.defined() ? in.dt.data<A>() : nullptr;
  const int32_t* segments = in.segments.defined() ? in.segments.data<int32_t>() : nullptr;

  const auto scratch = [&] { return OuterScratch<A>(z); };
  for_each_unit<A>(z, scratch, [&](OuterScratch<A>& s, int64_t b, int64_t c, int64_t g, int64_t t0, int64_t q) {
    pack_rows<A>(s.rows, z.np, B.at(b, t0, g), B.row, q, z.n, z.qp);
    for (int64_t h = g * z.group; h < (g + 1) * z.group; ++h) {
      const int64_t at = (b * z.l + t0) * z.heads + h;
      s.decay.fill(a + at, z.heads, segments ? segments + b * z.l + t0 : nullptr, t0 == 0, q);
      pack_rows<A>(s.others, z.pp, x.at(b, t0, h), x.row, q, z.p, z.qp);
      if (dt)
        for (int64_t j = 0; j < q; ++j) s.decay.out[j] *= dt[at + j * z.heads];
      scale_rows(s.others, s.others, s.decay.out, q, z.pp);
      const int64_t unit = (b * z.chunks + c) * z.heads + h;
      outer_sum(states + unit * z.state(), s.rows, s.others, q, z);
      total[unit] = s.decay.total;
    }
  });

  carry_over_chunks(states, total, in.initial_state, final_state, false, z);
}

template struct States<float>;
template struct States<double>;
template struct States<bf16>;

namespace {

template <class A>
struct ForwardScratch {
  Workspace<A> w;
  A *rows, *c_rows, *ct, *gt, *m, *xs, *acc;
  Decay<A> decay;
  explicit ForwardScratch(const Sizes<A>& z)
      : w(z.qp * (3 * z.np + 2 * z.qp + 2 * z.pp) + 1024 + Decay<A>::values(z.qp)), rows(w.take(z.qp * z.np)),
        c_rows(w.take(z.qp * z.np)), ct(w.take(z.qp * z.np)), gt(w.take(z.qp * z.qp)), m(w.take(z.qp * z.qp)),
        xs(w.take(z.qp * z.pp)), acc(w.take(z.qp * z.pp)), decay(w, z.qp) {}
};

template <class T, class A>
void store_rows(T* y, int64_t y_row, const A* __restrict acc, const T* x, int64_t x_row, const A* __restrict D,
                int64_t q, int64_t p, int64_t pp) {
  for (int64_t i = 0; i < q; ++i) {
    T* __restrict to = y + i * y_row;
    const T* __restrict from = x + i * x_row;
    const A* __restrict sum = acc + i * pp;
    if (D) {
#pragma omp simd
      for (int64_t c = 0; c < p; ++c) put(to[c], sum[c] + D[c] * static_cast<A>(from[c]));
    } else {
#pragma omp simd
      for (int64_t c = 0; c < p; ++c) put(to[c], sum[c]);
    }
  }
}

template <class A>
inline void multiply_row(A* __restrict m, const A* __restrict g, int64_t from, int64_t to) {
#pragma omp simd
  for (int64_t i = from; i < to; ++i) m[i] *= g[i];
}

}  // namespace
}  // namespace ssd

void ssd_forward(Tensor& y_out, Tensor& final_state, const SsdInput& in) {
  using namespace ssd;
  visit_float(in.x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Sizes<A> z(in);
    const States<T> states(in, &final_state);
    const View<const T> x(in.x), B(in.B), C(in.C);
    const View<T> y(y_out);
    const A* before = states.before.template data<A>();
    const A* a = in.a.data<A>();
    const A* dt = in.dt.defined() ? in.dt.data<A>() : nullptr;
    const A* D = in.D.defined() ? in.D.data<A>() : nullptr;
    const int32_t* segments = in.segments.defined() ? in.segments.data<int32_t>() : nullptr;
    using S = ForwardScratch<A>;
    for_each_unit<A>(z, [&] { return S(z); }, [&](S& s, int64_t b, int64_t c, int64_t g, int64_t t0, int64_t q) {
      pack_rows<A>(s.rows, z.np, B.at(b, t0, g), B.row, q, z.n, z.qp);
      pack_rows<A>(s.c_rows, z.np, C.at(b, t0, g), C.row, q, z.n, z.qp);
      transpose<A>(s.ct, z.qp, s.c_rows, z.np, z.qp, z.np);
      products_of_group(s.gt, s.rows, s.ct, q, z.qp, z.n, z.np);
      for (int64_t h = g * z.group; h < (g + 1) * z.group; ++h) {
        const int64_t at = (b * z.l + t0) * z.heads + h;
        s.decay.fill(a + at, z.heads, segments ? segments + b * z.l + t0 : nullptr, t0 == 0, q);
        pack_rows<A>(s.xs, z.pp, x.at(b, t0, h), x.row, q, z.p, z.qp);
        for (int64_t j = 0; j < q; ++j) {
          const int64_t from = first_column<A>(j);
          A* row = s.m + j * z.qp;
          mask_row(row, s.decay.high, s.decay.low, j, s.decay.end[static_cast<size_t>(j)], from, z.qp);
          multiply_row(row, s.gt + j * z.qp, from, z.qp);
          if (dt) {
            const A f = dt[at + j * z.heads];
            scale_rows(s.xs + j * z.pp, s.xs + j * z.pp, &f, 1, z.pp);
          }
        }
        const A* state = before + ((b * z.chunks + c) * z.heads + h) * z.state();
        for (int64_t i = 0; i < q; i += kStrip) {  // e^{s_i} h_in C_i + sum_j (C_i . B_j) M_ij dt_j x_j
          A* out = s.acc + i * z.pp;
          multiply_strip<A>(out, z.pp, s.c_rows + i * z.np, z.np, 1, state, z.pp, z.pp, z.n, false);
          scale_rows(out, out, s.decay.in + i, std::min<int64_t>(kStrip, q - i), z.pp);
          multiply_strip<A>(out, z.pp, s.m + i, 1, z.qp, s.xs, z.pp, z.pp, std::min(q, i + kStrip), true);
        }
        store_rows(y.at(b, t0, h), y.row, s.acc, x.at(b, t0, h), x.row, D ? D + h * z.p : nullptr, q, z.p, z.pp);
      }
    });
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

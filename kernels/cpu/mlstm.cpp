#include "kernels/mlstm.h"

#include <cmath>

#include "core/parallel.h"
#include "kernels/cpu/attention_unit.h"
#include "kernels/cpu/put.h"

// One (batch entry, head) per thread, chunk by chunk. n is kept as column dv of C: v gets a column of ones and d a
// column of dr, so that one set of products serves both.
namespace krait::kernels::cpu {

namespace {

template <class A> inline constexpr int64_t kPad = kLanes<A> > kStrip ? kLanes<A> : kStrip;

/// w = e^(c_j - u) for columns j in [first, t], 0 elsewhere; s *= w.
template <class A>
[[gnu::flatten, gnu::noinline]] void weigh_row(A* s, const A* c, A u, int first, int t, int width) {
#pragma omp simd
  for (int j = 0; j < width; ++j) {
    const A y = std::min(c[j] - u, A{0});
    const A e = vexp(y > kExpFloor<A> ? y : kExpFloor<A>);
    s[j] = y > kExpFloor<A> && j >= first && j <= t ? s[j] * e : A{0};
  }
}

/// The same on scores s and on their gradients ds.
template <class A>
[[gnu::flatten, gnu::noinline]] void weigh_rows(A* s, A* ds, const A* c, A u, int first, int t, int width) {
#pragma omp simd
  for (int j = 0; j < width; ++j) {
    const A y = std::min(c[j] - u, A{0});
    const A e = vexp(y > kExpFloor<A> ? y : kExpFloor<A>);
    const bool seen = y > kExpFloor<A> && j >= first && j <= t;
    s[j] = seen ? s[j] * e : A{0};
    ds[j] = seen ? ds[j] * e : A{0};
  }
}

template <class A>
A denominator(A r, A m, A eps) {
  return std::max(std::abs(r), std::exp(-std::max(m, A{-80}))) + eps;
}

template <class A>
void scale_row(A* to, const A* from, A factor, int64_t n) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) to[c] = from[c] * factor;
}

template <class T>
class Unit {
 public:
  using A = accum_t<T>;

  Unit(const MlstmInputs& in, const MlstmOptions& options)
      : q_(in.q), k_(in.k), v_(in.v), in_(in), eps_(static_cast<A>(options.eps)),
        full_gradient_(options.denominator_gradient), l_(in.q.size(1)), heads_(in.q.size(2)), dq_(in.q.size(3)),
        dv_(in.v.size(3)), chunk_(std::min(options.chunk, l_)), chunks_((l_ + chunk_ - 1) / chunk_),
        q_chunk_(round_up(chunk_, kPad<A>)), dqp_(round_up(dq_, kPad<A>)), dvp_(round_up(dv_ + 1, kPad<A>)),
        scale_(A{1} / std::sqrt(static_cast<A>(dq_))),
        scratch_(9 * q_chunk_ * (dqp_ + dvp_) + 2 * q_chunk_ * q_chunk_ + 4 * dqp_ * dvp_ + 8 * q_chunk_),
        qs_(scratch_.take(q_chunk_ * dqp_)), kr_(scratch_.take(q_chunk_ * dqp_)), kt_(scratch_.take(q_chunk_ * dqp_)),
        qi_(scratch_.take(q_chunk_ * dqp_)), kw_(scratch_.take(q_chunk_ * dqp_)), dqs_(scratch_.take(q_chunk_ * dqp_)),
        dk_(scratch_.take(q_chunk_ * dqp_)), vr_(scratch_.take(q_chunk_ * dvp_)), vt_(scratch_.take(q_chunk_ * dvp_)),
        vw_(scratch_.take(q_chunk_ * dvp_)), h_(scratch_.take(q_chunk_ * dvp_)), d_(scratch_.take(q_chunk_ * dvp_)),
        di_(scratch_.take(q_chunk_ * dvp_)), s_(scratch_.take(q_chunk_ * q_chunk_)),
        ds_(scratch_.take(q_chunk_ * q_chunk_)), state_(scratch_.take(dqp_ * dvp_)), g_(scratch_.take(dqp_ * dvp_)),
        turned_(scratch_.take(dqp_ * dvp_)), c_(scratch_.take(q_chunk_)), u_(scratch_.take(q_chunk_)),
        mt_(scratch_.take(q_chunk_)), inter_(scratch_.take(q_chunk_)), w_(scratch_.take(q_chunk_)),
        first_(static_cast<size_t>(q_chunk_)) {}

  void forward(int64_t b, int64_t h, const MlstmOut& out) {
    begin(b, h);
    for (int64_t x = 0; x < chunks_; ++x) {
      load(x);
      read_out(out);
      advance();
    }
    const int64_t unit = b * heads_ + h;
    store_state(out.last.c.data<A>() + unit * dq_ * dv_, out.last.n.data<A>() + unit * dq_, state_);
    out.last.m.data<A>()[unit] = m_;
  }

  void last_state(int64_t b, int64_t h, const MlstmState& last) {
    begin(b, h);
    for (int64_t x = 0; x < chunks_; ++x) {
      load(x);
      advance();
    }
    const int64_t unit = b * heads_ + h;
    store_state(last.c.data<A>() + unit * dq_ * dv_, last.n.data<A>() + unit * dq_, state_);
    last.m.data<A>()[unit] = m_;
  }

  void initial_gradient(int64_t b, int64_t h, const MlstmInitialGradient& grad, const Tensor& dh, const MlstmOut& out) {
    begin(b, h);
    const A first_m = m_;
    load_state(g_, nullptr, nullptr);
    for (int64_t x = chunks_ - 1; x >= 0; --x) {
      m_ = x == 0 ? first_m : out.m.data<A>()[row(x * chunk_ - 1)];
      load(x);
      load_upstream(dh, out);
      send_back();
    }
    const int64_t unit = b * heads_ + h;
    store_state(grad.dc0.data<A>() + unit * dq_ * dv_, grad.dn0.data<A>() + unit * dq_, g_);
  }

  void backward(int64_t b, int64_t h, const MlstmGrad& grad, const MlstmUpstream& up, const MlstmOut& out) {
    begin(b, h);
    const int64_t size = dqp_ * dvp_, unit = b * heads_ + h;
    const Tensor boundaries = empty({chunks_ + 1, size}, dtype_of<A>, kCpu), stabilisers = empty({chunks_}, dtype_of<A>, kCpu);
    A* states = boundaries.data<A>();
    A* ms = stabilisers.data<A>();
    std::copy(state_, state_ + size, states);
    for (int64_t x = 0; x < chunks_; ++x) {
      ms[x] = m_;
      load(x);
      advance();
      std::copy(state_, state_ + size, states + (x + 1) * size);
    }
    load_state(g_, up.dc_last.defined() ? up.dc_last.data<A>() + unit * dq_ * dv_ : nullptr,
               up.dn_last.defined() ? up.dn_last.data<A>() + unit * dq_ : nullptr);
    for (int64_t x = chunks_ - 1; x >= 0; --x) {
      m_ = ms[x];
      load(x);
      gradients(grad, up.dh, out, states + x * size, states + (x + 1) * size);
    }
    if (grad.dc0.defined()) store_state(grad.dc0.data<A>() + unit * dq_ * dv_, grad.dn0.data<A>() + unit * dq_, g_);
  }

 private:
  void begin(int64_t b, int64_t h) {
    b_ = b;
    head_ = h;
    ids_ = in_.segments.defined() ? in_.segments.data<int32_t>() + b * l_ : nullptr;
    const int64_t unit = b * heads_ + h;
    const bool given = in_.initial.c.defined();
    load_state(state_, given ? in_.initial.c.data<A>() + unit * dq_ * dv_ : nullptr,
               given ? in_.initial.n.data<A>() + unit * dq_ : nullptr);
    m_ = in_.initial.m.defined() ? in_.initial.m.data<A>()[unit] : A{0};
  }

  void load_state(A* to, const A* c, const A* n) const {
    std::fill(to, to + dqp_ * dvp_, A{0});
    for (int64_t i = 0; i < dq_; ++i) {
      if (c) std::copy(c + i * dv_, c + (i + 1) * dv_, to + i * dvp_);
      if (n) to[i * dvp_ + dv_] = n[i];
    }
  }
  void store_state(A* c, A* n, const A* from) const {
    for (int64_t i = 0; i < dq_; ++i) {
      std::copy(from + i * dvp_, from + i * dvp_ + dv_, c + i * dv_);
      n[i] = from[i * dvp_ + dv_];
    }
  }

  bool document_begins(int64_t t) const { return ids_ && t > 0 && ids_[t] != ids_[t - 1]; }
  // Gates and rows m, r lie (b, l, heads) and (b, heads, l).
  int64_t gate(int64_t t) const { return (b_ * l_ + t) * heads_ + head_; }
  int64_t row(int64_t t) const { return (b_ * heads_ + head_) * l_ + t; }

  // Rows and gates of chunk x, with the stabiliser m_ of the state before it.
  void load(int64_t x) {
    t0_ = x * chunk_;
    n_ = std::min(chunk_, l_ - t0_);
    rows_ = round_up(n_, kPad<A>);
    pack_rows<A>(qs_, dqp_, q_.at(b_, t0_, head_), q_.row, n_, dq_, rows_, scale_);
    pack_rows<A>(kr_, dqp_, k_.at(b_, t0_, head_), k_.row, n_, dq_, rows_);
    pack_rows<A>(vr_, dvp_, v_.at(b_, t0_, head_), v_.row, n_, dv_, rows_);
    const A* i = in_.i.data<A>();
    const A* f = in_.f.data<A>();
    bool fresh = false;
    int first = 0;
    A b = 0, top = m_;
    for (int64_t t = 0; t < n_; ++t) {
      vr_[t * dvp_ + dv_] = 1;
      if (document_begins(t0_ + t)) {
        fresh = true;
        first = static_cast<int>(t);
        b = top = 0;
      }
      b -= vsoftplus(-f[gate(t0_ + t)]);
      c_[t] = i[gate(t0_ + t)] - b;
      top = std::max(top, c_[t]);
      u_[t] = top;
      mt_[t] = b + top;
      first_[static_cast<size_t>(t)] = first;
      inter_[t] = fresh ? A{0} : std::exp(m_ - top);
    }
    decay_ = inter_[n_ - 1];
    m_next_ = mt_[n_ - 1];
    for (int64_t t = n_; t < rows_; ++t) {
      c_[t] = u_[t] = inter_[t] = 0;
      first_[static_cast<size_t>(t)] = static_cast<int>(rows_);
    }
    for (int64_t t = 0; t < rows_; ++t) {
      w_[t] = t >= first && t < n_ ? std::exp(c_[t] - top) : A{0};
      scale_row(qi_ + t * dqp_, qs_ + t * dqp_, inter_[t], dqp_);
      scale_row(kw_ + t * dqp_, kr_ + t * dqp_, w_[t], dqp_);
    }
    transpose(kt_, q_chunk_, kr_, dqp_, rows_, dqp_);
  }

  void scores(int64_t r0, int64_t width) {
    multiply_strip(s_ + r0 * q_chunk_, q_chunk_, qs_ + r0 * dqp_, dqp_, 1, kt_, q_chunk_, width, dqp_, false);
  }
  int64_t width_of(int64_t r0) const { return std::min(rows_, round_up(r0 + kStrip, kLanes<A>)); }

  void read_out(const MlstmOut& out) {
    for (int64_t r0 = 0; r0 < rows_; r0 += kStrip) {
      const int64_t width = width_of(r0);
      scores(r0, width);
      for (int64_t t = r0; t < r0 + kStrip; ++t)
        weigh_row(s_ + t * q_chunk_, c_, u_[t], first_[static_cast<size_t>(t)], static_cast<int>(t),
                  static_cast<int>(width));
      multiply_strip(h_ + r0 * dvp_, dvp_, s_ + r0 * q_chunk_, q_chunk_, 1, vr_, dvp_, dvp_, width, false);
      multiply_strip(h_ + r0 * dvp_, dvp_, qi_ + r0 * dqp_, dqp_, 1, state_, dvp_, dvp_, dqp_, true);
    }
    A* h = out.h.data<A>();
    for (int64_t t = 0; t < n_; ++t) {
      const A* from = h_ + t * dvp_;
      const A r = from[dv_], factor = A{1} / denominator(r, mt_[t], eps_);
      out.m.data<A>()[row(t0_ + t)] = mt_[t];
      out.r.data<A>()[row(t0_ + t)] = r;
      scale_row(h + gate(t0_ + t) * dv_, from, factor, dv_);
    }
  }

  // The state behind the chunk.
  void advance() {
    scale_row(state_, state_, decay_, dqp_ * dvp_);
    for (int64_t i = 0; i < dqp_; i += kStrip)
      multiply_strip(state_ + i * dvp_, dvp_, kw_ + i, 1, dqp_, vr_, dvp_, dvp_, rows_, true);
    m_ = m_next_;
  }

  // d and dr of every row from dh; d is 0 behind the last row.
  void load_upstream(const Tensor& dh, const MlstmOut& out) {
    const A* dhs = dh.data<A>();
    const A* hs = out.h.data<A>();
    pack_rows<A>(d_, dvp_, dhs + gate(t0_) * dv_, heads_ * dv_, n_, dv_, rows_);
    for (int64_t t = 0; t < n_; ++t) {
      const A r = out.r.data<A>()[row(t0_ + t)], m = out.m.data<A>()[row(t0_ + t)];
      const A factor = A{1} / denominator(r, m, eps_);
      A* d = d_ + t * dvp_;
      if (full_gradient_ && std::abs(r) >= std::exp(-std::max(m, A{-80})))
        d[dv_] = -dot_row<A>(dhs + gate(t0_ + t) * dv_, hs + gate(t0_ + t) * dv_, dv_) * (r < 0 ? A{-1} : A{1});
      scale_row(d, d, factor, dv_ + 1);
    }
    for (int64_t t = 0; t < rows_; ++t) {
      scale_row(di_ + t * dvp_, d_ + t * dvp_, inter_[t], dvp_);
      scale_row(vw_ + t * dvp_, vr_ + t * dvp_, w_[t], dvp_);
    }
  }

  // Gradients of the chunk; g_ is that of the state behind it, and becomes that of the state before it.
  void gradients(const MlstmGrad& grad, const Tensor& dh, const MlstmOut& out, const A* before, const A* behind) {
    load_upstream(dh, out);
    transpose(vt_, q_chunk_, vr_, dvp_, rows_, dvp_);
    transpose(turned_, dqp_, before, dvp_, dqp_, dvp_);
    for (int64_t r0 = 0; r0 < rows_; r0 += kStrip) {
      const int64_t width = width_of(r0);
      scores(r0, width);
      A* ds = ds_ + r0 * q_chunk_;
      multiply_strip(ds, q_chunk_, d_ + r0 * dvp_, dvp_, 1, vt_, q_chunk_, width, dvp_, false);
      for (int64_t t = r0; t < r0 + kStrip; ++t)
        weigh_rows(s_ + t * q_chunk_, ds_ + t * q_chunk_, c_, u_[t], first_[static_cast<size_t>(t)],
                   static_cast<int>(t), static_cast<int>(width));
      multiply_strip(dqs_ + r0 * dqp_, dqp_, ds, q_chunk_, 1, kr_, dqp_, dqp_, width, false);
      multiply_strip(dqs_ + r0 * dqp_, dqp_, di_ + r0 * dvp_, dvp_, 1, turned_, dqp_, dqp_, dvp_, true);
    }
    transpose(turned_, dqp_, g_, dvp_, dqp_, dvp_);
    for (int64_t j = 0; j < rows_; j += kStrip) {
      const int64_t at = j * q_chunk_ + j, rest = rows_ - j;
      A* dk = dk_ + j * dqp_;
      A* dv = h_ + j * dvp_;
      multiply_strip(dk, dqp_, ds_ + at, 1, q_chunk_, qs_ + j * dqp_, dqp_, dqp_, rest, false);
      multiply_strip(dk, dqp_, vw_ + j * dvp_, dvp_, 1, turned_, dqp_, dqp_, dvp_, true);
      multiply_strip(dv, dvp_, s_ + at, 1, q_chunk_, d_ + j * dvp_, dvp_, dvp_, rest, false);
      multiply_strip(dv, dvp_, kw_ + j * dqp_, dqp_, 1, g_, dvp_, dvp_, dqp_, true);
    }
    gate_gradients(grad, dot_row<A>(g_, behind, dqp_ * dvp_));
    for (int64_t t = 0; t < n_; ++t) {
      put_row(grad.dq.data<T>() + gate(t0_ + t) * dq_, dqs_ + t * dqp_, scale_, dq_);
      put_row(grad.dk.data<T>() + gate(t0_ + t) * dq_, dk_ + t * dqp_, A{1}, dq_);
      put_row(grad.dv.data<T>() + gate(t0_ + t) * dv_, h_ + t * dvp_, A{1}, dv_);
    }
    send_back();
  }

  // g from the gradient of the state behind the chunk to that of the state before it.
  void send_back() {
    scale_row(g_, g_, decay_, dqp_ * dvp_);
    for (int64_t i = 0; i < dqp_; i += kStrip)
      multiply_strip(g_ + i * dvp_, dvp_, qi_ + i, 1, dqp_, d_, dvp_, dvp_, rows_, true);
  }

  // `flow`: <dC, C> + <dn, n> behind the chunk; carried backwards it is the gradient of lf.
  void gate_gradients(const MlstmGrad& grad, A flow) const {
    const A* f = in_.f.data<A>();
    A* di = grad.di.data<A>();
    A* df = grad.df.data<A>();
    for (int64_t t = n_ - 1; t >= 0; --t) {
      const int64_t at = gate(t0_ + t);
      di[at] = dot_row<A>(kr_ + t * dqp_, dk_ + t * dqp_, dqp_);
      flow += dot_row<A>(qs_ + t * dqp_, dqs_ + t * dqp_, dqp_) - di[at];
      if (document_begins(t0_ + t) || (t0_ + t == 0 && !in_.initial.c.defined())) flow = 0;
      df[at] = flow * vsigmoid(-f[at]);
    }
  }

  static void put_row(T* to, const A* from, A factor, int64_t n) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) put(to[c], from[c] * factor);
  }

  Rows<const T> q_, k_, v_;
  const MlstmInputs& in_;
  A eps_;
  bool full_gradient_;
  int64_t l_, heads_, dq_, dv_, chunk_, chunks_, q_chunk_, dqp_, dvp_;
  A scale_;
  Scratch<A> scratch_;
  A *qs_, *kr_, *kt_, *qi_, *kw_, *dqs_, *dk_, *vr_, *vt_, *vw_, *h_, *d_, *di_, *s_, *ds_, *state_, *g_, *turned_;
  A *c_, *u_, *mt_, *inter_, *w_;
  std::vector<int> first_;
  const int32_t* ids_ = nullptr;
  int64_t b_ = 0, head_ = 0, t0_ = 0, n_ = 0, rows_ = 0;
  A m_ = 0, m_next_ = 0, decay_ = 0;
};

// f(unit, row, head) for every row and head.
template <class F>
void for_units(const MlstmInputs& in, const MlstmOptions& options, F&& f) {
  const int64_t heads = in.q.size(2);
  visit_float(in.q.dtype(), [&]<class T>() {
    parallel_for(0, in.q.size(0) * heads, 1, [&](int64_t first, int64_t last) {
      Unit<T> unit(in, options);
      for (int64_t x = first; x < last; ++x) f(unit, x / heads, x % heads);
    });
  });
}

}  // namespace

void mlstm_forward(MlstmOut& out, const MlstmInputs& in, const MlstmOptions& options) {
  for_units(in, options, [&](auto& unit, int64_t row, int64_t head) { unit.forward(row, head, out); });
}

void mlstm_backward(MlstmGrad& grad, const MlstmUpstream& upstream, const MlstmInputs& in, const MlstmOut& out,
                    const MlstmOptions& options) {
  for_units(in, options, [&](auto& unit, int64_t row, int64_t head) { unit.backward(row, head, grad, upstream, out); });
}

void mlstm_last_state(MlstmState& last, const MlstmInputs& in, const MlstmOptions& options) {
  for_units(in, options, [&](auto& unit, int64_t row, int64_t head) { unit.last_state(row, head, last); });
}

void mlstm_initial_gradient(MlstmInitialGradient& grad, const Tensor& dh, const MlstmInputs& in, const MlstmOut& out,
                            const MlstmOptions& options, const Tensor&) {
  for_units(in, options, [&](auto& unit, int64_t row, int64_t head) { unit.initial_gradient(row, head, grad, dh, out); });
}

void mlstm_step(Tensor& h_, const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& i_, const Tensor& f_,
                MlstmState& state, double eps) {
  const int64_t units = q_.size(0) * q_.size(1), dq = q_.size(2), dv = v_.size(2);
  visit_float(q_.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const A scale = A{1} / std::sqrt(static_cast<A>(dq));
    parallel_for(0, units, 1 + 65536 / (dq * dv), [&](int64_t begin, int64_t end) {
      std::vector<A> sum(static_cast<size_t>(dv));
      for (int64_t x = begin; x < end; ++x) {
        const T* q = q_.data<T>() + x * dq;
        const T* k = k_.data<T>() + x * dq;
        const T* v = v_.data<T>() + x * dv;
        A* n = state.n.data<A>() + x * dq;
        A& m = state.m.data<A>()[x];
        const A i = i_.data<A>()[x], lf = -vsoftplus(-f_.data<A>()[x]), top = std::max(lf + m, i);
        const A keep = std::exp(lf + m - top), take = std::exp(i - top);
        m = top;
        A r = 0;
        std::fill(sum.begin(), sum.end(), A{0});
        A* __restrict num = sum.data();
        for (int64_t c = 0; c < dq; ++c) {
          const A kc = take * static_cast<A>(k[c]), qc = scale * static_cast<A>(q[c]);
          A* __restrict row = state.c.data<A>() + (x * dq + c) * dv;
          n[c] = keep * n[c] + kc;
          r += qc * n[c];
#pragma omp simd
          for (int64_t e = 0; e < dv; ++e) {
            row[e] = keep * row[e] + kc * static_cast<A>(v[e]);
            num[e] += qc * row[e];
          }
        }
        const A factor = A{1} / denominator(r, top, static_cast<A>(eps));
        scale_row(h_.data<A>() + x * dv, num, factor, dv);
      }
    });
  });
}

void mlstm_kernel_name(std::string& name, DType dtype, int64_t, int64_t) {
  name = fmt::format("own, chunkwise, {}", name_of(dtype == DType::bf16 ? DType::f32 : dtype));
}

}  // namespace krait::kernels::cpu

// Nodes in chunks, so that every loop over nodes is vector code on arrays in the first-level cache; states outside.
#include "kernels/s4_kernel.h"

#include <numbers>

#include "core/parallel.h"
#include "kernels/cpu/fft.h"
#include "kernels/s4_math.h"
#include "kernels/ssm_gradients.h"
#include "kernels/visit_wide.h"

namespace krait::kernels::cpu {

namespace {

constexpr int64_t kChunk = 128;

template <class T>
struct Parameters {
  const T *log_dt, *log_A_re, *A_im, *P, *B, *C;
  int64_t n, group;
  explicit Parameters(const S4Parameters& p)
      : log_dt(p.log_dt.data<T>()), log_A_re(p.log_A_re.data<T>()), A_im(p.A_im.data<T>()), P(p.P.data<T>()),
        B(p.B.data<T>()), C(p.C_tilde.data<T>()), n(p.log_A_re.size(1)),
        group(p.log_dt.size(0) / p.log_A_re.size(0)) {}
  template <int R>
  std::vector<S4State<R>> states(int64_t h) const {
    std::vector<S4State<R>> all(static_cast<size_t>(n));
    for (int64_t j = 0; j < n; ++j)
      all[static_cast<size_t>(j)] = s4_state<R>(log_dt, log_A_re, A_im, P, B, C, h, h / group, j, n);
    return all;
  }
};

// sin and cos of half the nodes' angles, k = 0 ... length/2; s is twice the sine.
struct Nodes {
  std::vector<double> s, c;
  explicit Nodes(int64_t length) {
    for (int64_t k = 0; k <= length / 2; ++k) {
      const double half = std::numbers::pi * static_cast<double>(k) / static_cast<double>(length);
      s.push_back(2.0 * std::sin(half));
      c.push_back(2 * k == length ? 0.0 : std::cos(half));
    }
  }
  int64_t size() const { return static_cast<int64_t>(s.size()); }
};

struct alignas(64) Row {
  double v[kChunk];
};

// 1 / D of one state at `count` nodes.
[[gnu::always_inline]] inline void reciprocals(double* __restrict wr, double* __restrict wi, double alpha, double beta,
                                               const double* __restrict s, const double* __restrict c, int64_t count) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) {
    const double u = -c[k] * alpha, v = c[k] * beta;
    const double dr = u * u + (v - s[k]) * (v + s[k]), di = 2.0 * u * s[k];
    const double scale = 1.0 / (dr * dr + di * di);
    wr[k] = dr * scale;
    wi[k] = -di * scale;
  }
}

template <int R>
struct Sums {
  static constexpr int kSums = S4State<R>::kSums;
  Row re[kSums], im[kSums], wr, wi;

  void compute(const std::vector<S4State<R>>& states, const double* __restrict s, const double* __restrict c,
               int64_t count) {
    for (int i = 0; i < kSums; ++i) {
      std::fill_n(re[i].v, count, 0.0);
      std::fill_n(im[i].v, count, 0.0);
    }
    for (const S4State<R>& state : states) {
      reciprocals(wr.v, wi.v, state.alpha, state.beta, s, c, count);
      for (int i = 0; i < kSums; ++i) {
        const double p = state.p[i], q = state.q[i];
        double *__restrict r = re[i].v, *__restrict m = im[i].v;
#pragma omp simd
        for (int64_t k = 0; k < count; ++k) {
          const double a = c[k] * p, b = s[k] * q;
          r[k] += a * wr.v[k] - b * wi.v[k];
          m[k] += a * wi.v[k] + b * wr.v[k];
        }
      }
    }
  }
  void gather(Complex64* out, int64_t k) const {
    for (int i = 0; i < kSums; ++i) out[i] = {re[i].v[k], im[i].v[k]};
  }
};

// What one state's gradients sum over the nodes.
template <int R>
struct StateGrad {
  double dp[S4State<R>::kSums] = {}, dq[S4State<R>::kSums] = {}, dalpha = 0, dbeta = 0;
};

// Adds a chunk's part: dr, di hold the gradients of the sums.
template <int R>
void add_gradients(std::vector<StateGrad<R>>& grads, const std::vector<S4State<R>>& states, const Row* dr,
                   const Row* di, Row& wr, Row& wi, const double* __restrict s, const double* __restrict c,
                   int64_t count) {
  Row tr, ti;
  for (size_t j = 0; j < states.size(); ++j) {
    const S4State<R>& state = states[j];
    StateGrad<R>& grad = grads[j];
    reciprocals(wr.v, wi.v, state.alpha, state.beta, s, c, count);
    std::fill_n(tr.v, count, 0.0);
    std::fill_n(ti.v, count, 0.0);
    for (int i = 0; i < S4State<R>::kSums; ++i) {
      const double p = state.p[i], q = state.q[i];
      const double *__restrict xr = dr[i].v, *__restrict xi = di[i].v;
      double dp = 0, dq = 0;
#pragma omp simd reduction(+ : dp, dq)
      for (int64_t k = 0; k < count; ++k) {
        dp += c[k] * (wr.v[k] * xr[k] + wi.v[k] * xi[k]);
        dq += s[k] * (wr.v[k] * xi[k] - wi.v[k] * xr[k]);
        const double a = c[k] * p, b = s[k] * q;
        tr.v[k] += a * xr[k] + b * xi[k];
        ti.v[k] += a * xi[k] - b * xr[k];
      }
      grad.dp[i] += dp;
      grad.dq[i] += dq;
    }
    double dalpha = 0, dbeta = 0;  // W = 1/D: dD = -conj(W^2) dW
#pragma omp simd reduction(+ : dalpha, dbeta)
    for (int64_t k = 0; k < count; ++k) {
      const double w2r = wr.v[k] * wr.v[k] - wi.v[k] * wi.v[k], w2i = 2.0 * wr.v[k] * wi.v[k];
      const double ddr = -(w2r * tr.v[k] + w2i * ti.v[k]), ddi = -(w2r * ti.v[k] - w2i * tr.v[k]);
      const double u = -c[k] * state.alpha, v = c[k] * state.beta;
      dalpha -= 2.0 * c[k] * (u * ddr + s[k] * ddi);
      dbeta += 2.0 * c[k] * v * ddr;
    }
    grad.dalpha += dalpha;
    grad.dbeta += dbeta;
  }
}

template <class T, int R>
void forward(T* K, const Parameters<T>& p, const Nodes& nodes, int64_t length, int64_t h) {
  const auto& fft = fft_plan<AnyRealFft<double>>(length);
  const auto states = p.template states<R>(h);
  std::vector<double> re(nodes.s.size()), im(nodes.s.size()), out(static_cast<size_t>(length));
  std::vector<double> scratch(static_cast<size_t>(fft.scratch_size()));
  const auto sums = std::make_unique<Sums<R>>();
  for (int64_t first = 0; first < nodes.size(); first += kChunk) {
    const int64_t count = std::min(kChunk, nodes.size() - first);
    sums->compute(states, nodes.s.data() + first, nodes.c.data() + first, count);
    for (int64_t k = 0; k < count; ++k) {
      Complex64 at[S4State<R>::kSums];
      sums->gather(at, k);
      const auto i = static_cast<size_t>(first + k);
      const Complex64 value = Complex64{nodes.c[i], 0.5 * nodes.s[i]} * s4_woodbury<R>(at, nodes.c[i]);
      re[i] = value.re;
      im[i] = value.im;
    }
  }
  fft.inverse(out.data(), re.data(), im.data(), scratch.data());
  for (int64_t l = 0; l < length; ++l)
    K[h * length + l] = static_cast<T>(out[static_cast<size_t>(l)] / static_cast<double>(length));
}

template <class T, int R>
void backward(T* dC, double* contributions, const T* dK, const Parameters<T>& p, const Nodes& nodes, int64_t length,
              int64_t h) {
  const auto& fft = fft_plan<AnyRealFft<double>>(length);
  const auto states = p.template states<R>(h);
  std::vector<double> re(nodes.s.size()), im(nodes.s.size());
  const std::vector<double> in(dK + h * length, dK + (h + 1) * length);
  std::vector<double> scratch(static_cast<size_t>(fft.scratch_size()));
  fft.forward(re.data(), im.data(), in.data(), scratch.data());
  const auto sums = std::make_unique<Sums<R>>();
  std::vector<Row> dr(S4State<R>::kSums), di(S4State<R>::kSums);
  std::vector<StateGrad<R>> grads(states.size());
  for (int64_t first = 0; first < nodes.size(); first += kChunk) {
    const int64_t count = std::min(kChunk, nodes.size() - first);
    const double *s = nodes.s.data() + first, *c = nodes.c.data() + first;
    sums->compute(states, s, c, count);
    for (int64_t k = 0; k < count; ++k) {
      Complex64 at[S4State<R>::kSums], d[S4State<R>::kSums];
      sums->gather(at, k);
      const int64_t i = first + k;
      // bins 0 and length/2 stand for themselves, the others for their conjugates too
      const double weight = (i == 0 || 2 * i == length ? 1.0 : 2.0) / static_cast<double>(length);
      const Complex64 dK_hat{weight * re[static_cast<size_t>(i)], weight * im[static_cast<size_t>(i)]};
      s4_woodbury_backward<R>(d, at, c[k], Complex64{c[k], -0.5 * s[k]} * dK_hat);
      for (int x = 0; x < S4State<R>::kSums; ++x) {
        dr[static_cast<size_t>(x)].v[k] = d[x].re;
        di[static_cast<size_t>(x)].v[k] = d[x].im;
      }
    }
    add_gradients<R>(grads, states, dr.data(), di.data(), sums->wr, sums->wi, s, c, count);
  }
  for (int64_t j = 0; j < p.n; ++j) {
    const StateGrad<R>& g = grads[static_cast<size_t>(j)];
    store_complex(dC, h * p.n + j,
                  s4_chain<R>(contributions + (h * p.n + j) * S4State<R>::kGradients, states[static_cast<size_t>(j)],
                              g.dp, g.dq, g.dalpha, g.dbeta));
  }
}

}  // namespace

void s4_kernel_forward(Tensor& K, const S4Parameters& parameters) {
  const int64_t length = K.size(1);
  const Nodes nodes(length);
  visit_wide(K.dtype(), [&]<class T>() {
    const Parameters<T> p(parameters);
    parallel_for(0, K.size(0), 1, [&](int64_t first, int64_t last) {
      for (int64_t h = first; h < last; ++h) {
        if (parameters.P.size(1) == 1)
          forward<T, 1>(K.data<T>(), p, nodes, length, h);
        else
          forward<T, 2>(K.data<T>(), p, nodes, length, h);
      }
    });
  });
}

void s4_kernel_backward(Tensor& dC_tilde, Tensor& contributions, const Tensor& dK, const S4Parameters& parameters) {
  const int64_t length = dK.size(1);
  const Nodes nodes(length);
  visit_wide(dK.dtype(), [&]<class T>() {
    const Parameters<T> p(parameters);
    T* dC = dC_tilde.data<T>();
    double* all = contributions.data<double>();
    parallel_for(0, dK.size(0), 1, [&](int64_t first, int64_t last) {
      for (int64_t h = first; h < last; ++h) {
        if (parameters.P.size(1) == 1)
          backward<T, 1>(dC, all, dK.data<T>(), p, nodes, length, h);
        else
          backward<T, 2>(dC, all, dK.data<T>(), p, nodes, length, h);
      }
    });
  });
}

}  // namespace krait::kernels::cpu

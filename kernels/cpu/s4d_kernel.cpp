// Positions are taken in tiles of kTile: A_bar^l = A_bar^(start of the tile) A_bar^(l in the tile). The powers inside
// a tile are made once per state, so that the inner loops are multiply-adds along l; everything that accumulates over
// tiles is in double.
#include "kernels/s4d_kernel.h"

#include <cmath>

#include "core/parallel.h"
#include "kernels/s4d_math.h"
#include "kernels/ssm_gradients.h"
#include "kernels/visit_wide.h"

namespace krait::kernels::cpu {

namespace {

constexpr int64_t kTile = 64;

// A_bar^l, l < kTile, in T, and A_bar^kTile.
template <class T>
struct Powers {
  alignas(64) T re[kTile], im[kTile];
  Complex64 whole;
  explicit Powers(Complex64 A_bar) {
    Complex64 w{1, 0};
    for (int64_t l = 0; l < kTile; ++l) {
      re[l] = static_cast<T>(w.re);
      im[l] = static_cast<T>(w.im);
      w = w * A_bar;
    }
    whole = w;
  }
};

// What is smaller no longer shows in a sum of T, and would be slow as subnormal numbers.
template <class T>
bool negligible(Complex64 w) {
  constexpr double limit = sizeof(T) == 4 ? 1e-36 : 1e-290;
  return std::abs(w.re) + std::abs(w.im) < limit;
}

template <class T>
struct Channels {
  const T *log_dt, *log_A_re, *A_im, *B, *C;
  int64_t n, group;
  bool zoh;
  Channels(const S4dParameters& p, bool is_zoh)
      : log_dt(p.log_dt.data<T>()), log_A_re(p.log_A_re.data<T>()), A_im(p.A_im.data<T>()), B(p.B.data<T>()),
        C(p.C.data<T>()), n(p.log_A_re.size(1)), group(p.log_dt.size(0) / p.log_A_re.size(0)), zoh(is_zoh) {}
  int64_t at(int64_t c, int64_t j) const { return c / group * n + j; }  // in tensors of sets
  S4dState state(int64_t c, int64_t j) const {
    const int64_t i = at(c, j);
    return s4d_state(static_cast<double>(log_dt[c]), static_cast<double>(log_A_re[i]), static_cast<double>(A_im[i]),
                     zoh);
  }
};

template <class T>
void add_state(T* K, int64_t length, Complex64 c, const Powers<T>& powers) {
  Complex64 w{2 * c.re, 2 * c.im};
  for (int64_t start = 0; start < length && !negligible<T>(w); start += kTile, w = w * powers.whole) {
    const T wr = static_cast<T>(w.re), wi = static_cast<T>(w.im);
    T* __restrict out = K + start;
    const T *__restrict pr = powers.re, *__restrict pi = powers.im;
    const int64_t count = std::min(kTile, length - start);
#pragma omp simd
    for (int64_t l = 0; l < count; ++l) out[l] += wr * pr[l] - wi * pi[l];
  }
}

// sum_l g_l w^l and sum_l l g_l w^l
struct Moments {
  Complex64 zeroth{0, 0}, first{0, 0};
};
template <class T>
Moments moments(const T* g_all, int64_t length, const Powers<T>& powers) {
  Moments m;
  Complex64 w{1, 0};
  for (int64_t start = 0; start < length && !negligible<T>(w); start += kTile, w = w * powers.whole) {
    const T *__restrict g = g_all + start, *__restrict pr = powers.re, *__restrict pi = powers.im;
    const int64_t count = std::min(kTile, length - start);
    T r0 = 0, i0 = 0, r1 = 0, i1 = 0;
#pragma omp simd reduction(+ : r0, i0, r1, i1)
    for (int64_t l = 0; l < count; ++l) {
      const T r = g[l] * pr[l], i = g[l] * pi[l], at = static_cast<T>(l);
      r0 += r;
      i0 += i;
      r1 += at * r;
      i1 += at * i;
    }
    const Complex64 s0 = w * Complex64{static_cast<double>(r0), static_cast<double>(i0)};
    const Complex64 s1 = w * Complex64{static_cast<double>(r1), static_cast<double>(i1)};
    m.zeroth = m.zeroth + s0;
    m.first = m.first + s1 + static_cast<double>(start) * s0;
  }
  return m;
}

int64_t grain(int64_t n, int64_t length) { return std::max<int64_t>(1, (int64_t{1} << 16) / std::max<int64_t>(n * length, 1)); }

}  // namespace

void s4d_kernel_forward(Tensor& K, const S4dParameters& p, bool zoh) {
  const int64_t h = K.size(0), length = K.size(1);
  visit_wide(K.dtype(), [&]<class T>() {
    const Channels<T> channels(p, zoh);
    T* out = K.data<T>();
    parallel_for(0, h, grain(channels.n, length), [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        std::fill_n(out + c * length, length, T(0));
        for (int64_t j = 0; j < channels.n; ++j) {
          const S4dState s = channels.state(c, j);
          const Complex64 B = load_complex(channels.B, channels.at(c, j)), C = load_complex(channels.C, c * channels.n + j);
          add_state(out + c * length, length, C * (s.f * B), Powers<T>(s.A_bar));
        }
      }
    });
  });
}

void s4d_kernel_backward(Tensor& dC, Tensor& contributions, const Tensor& dK, const S4dParameters& p, bool zoh) {
  const int64_t h = dK.size(0), length = dK.size(1);
  double* all = contributions.data<double>();
  visit_wide(dK.dtype(), [&]<class T>() {
    const Channels<T> channels(p, zoh);
    const int64_t n = channels.n;
    const T* g = dK.data<T>();
    T* dc_out = dC.data<T>();
    parallel_for(0, h, grain(n, length), [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c)
        for (int64_t j = 0; j < n; ++j) {
          const S4dState s = channels.state(c, j);
          const Complex64 B = load_complex(channels.B, channels.at(c, j)), C = load_complex(channels.C, c * n + j);
          // over l >= 1: sum g_l w^(l-1) and sum l g_l w^(l-1), which stay right at w = 0
          const Moments m = moments(g + c * length + 1, length - 1, Powers<T>(s.A_bar));
          const Complex64 first_power = m.zeroth + m.first;
          Complex64 zeroth = s.A_bar * m.zeroth;
          zeroth.re += static_cast<double>(g[c * length]);
          const Complex64 dA_bar = 2.0 * conj(C * (s.f * B) * first_power);
          store_complex(dc_out, c * n + j,
                        s4d_chain(all + (c * n + j) * kS4dGradients, s, B, C, 2.0 * conj(zeroth), dA_bar, zoh));
        }
    });
  });
}

}  // namespace krait::kernels::cpu

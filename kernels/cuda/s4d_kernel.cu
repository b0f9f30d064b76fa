// A_bar^l is a product of few tabled powers, each made from the exponential with its angle in turns reduced in double,
// so that the inner loops are multiply-adds. States come in chunks; nothing of size h n l exists.
#include "core/cuda/launch.cuh"
#include "kernels/cuda/fft.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/s4d_math.h"
#include "kernels/ssm_gradients.h"
#include "kernels/visit_wide.h"

namespace krait::kernels::cuda {

namespace {

constexpr int kStates = 32;  // of a chunk
constexpr int kNear = 16;    // of the forward: neighbouring threads that share one far power
constexpr int kStep = 16;    // of the backward: positions between two steps of the outer recurrence
constexpr int kSpan = 128;   // positions that a warp stages at a time
constexpr int kWarps = 8;    // of the backward: a piece of the positions each

// A_bar as e^(log_modulus + 2 pi i turns); 0 has log_modulus -inf.
struct Polar {
  double log_modulus, turns;
};

__device__ Polar polar(Complex64 w) {
  return {0.5 * log(norm(w)), norm(w) > 0 ? atan2(w.im, w.re) * 0.15915494309189533577 : 0.0};
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// A_bar^l
template <class T>
__device__ Complex<T> power(const Polar& a, int64_t l) {
  if (l == 0) return {T(1), T(0)};
  const double at = static_cast<double>(l) * a.turns;
  const T modulus = exponential(static_cast<T>(static_cast<double>(l) * a.log_modulus));
  Complex<T> w;
  sin_cos_pi(static_cast<T>(2.0 * (at - rint(at))), &w.im, &w.re);
  return modulus * w;
}

template <class T>
struct Channels {
  const T *log_dt, *log_A_re, *A_im, *B, *C;
  int64_t n, group;
  bool zoh;
  __device__ int64_t at(int64_t c, int64_t j) const { return c / group * n + j; }
  __device__ S4dState state(int64_t c, int64_t j) const {
    return s4d_state(static_cast<double>(log_dt[c]), static_cast<double>(log_A_re[at(c, j)]),
                     static_cast<double>(A_im[at(c, j)]), zoh);
  }
};

template <class T>
Channels<T> channels_of(const S4dParameters& p, bool zoh) {
  return {p.log_dt.data<T>(), p.log_A_re.data<T>(), p.A_im.data<T>(), p.B.data<T>(), p.C.data<T>(),
          p.log_A_re.size(1), p.log_dt.size(0) / p.log_A_re.size(0), zoh};
}

__device__ __forceinline__ void load_two(Complex<float>& a, Complex<float>& b, const Complex<float>* from) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  a = {v.x, v.y};
  b = {v.z, v.w};
}
__device__ __forceinline__ void load_two(Complex<double>& a, Complex<double>& b, const Complex<double>* from) {
  a = from[0];
  b = from[1];
}

// A state's part of K: K_l = sum Re(w A_bar^l).
struct Term {
  Polar a;
  Complex64 w;
};

// One thread a state: their long chains in double run side by side here, once a channel.
template <class T>
__global__ void terms_kernel(Term* terms, Channels<T> channels, int64_t h) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= h * channels.n) return;
  const int64_t c = i / channels.n, j = i % channels.n;
  const S4dState s = channels.state(c, j);
  terms[i] = {polar(s.A_bar), 2.0 * (load_complex(channels.C, i) * (s.f * load_complex(channels.B, channels.at(c, j))))};
}

// Block (channel, piece of the positions); thread p makes kTile positions from base + p kTile on. With p = kNear q + r
// the power at its first position is A_bar^(base + kTile kNear q) A_bar^(kTile r), and w lies in the first of the two.
// Bound by the multiply-adds: 2 h n l.
template <class T, int kTile, int kThreads>
__global__ void __launch_bounds__(kThreads) forward_kernel(T* K, const Term* __restrict__ all, int64_t n, int64_t length) {
  constexpr int kFar = kThreads / kNear, kPowers = kFar + kNear + kTile;
  __shared__ __align__(16) Complex<T> table[kStates][kTile];
  __shared__ Complex<T> far[kStates][kFar], near[kStates][kNear];
  __shared__ Term terms[kStates];
  const int64_t c = blockIdx.x, base = int64_t{blockIdx.y} * kThreads * kTile, first = base + threadIdx.x * kTile;
  T sum[kTile] = {};
  for (int64_t j0 = 0; j0 < n; j0 += kStates) {
    const int count = static_cast<int>(min(int64_t{kStates}, n - j0));
    for (int j = threadIdx.x; j < count; j += kThreads) terms[j] = all[c * n + j0 + j];
    __syncthreads();
    for (int i = threadIdx.x; i < count * kPowers; i += kThreads) {
      const int j = i / kPowers, k = i % kPowers;
      const bool is_far = k < kFar, is_near = k < kFar + kNear;
      const int64_t l = is_far ? base + k * kNear * kTile : is_near ? (k - kFar) * kTile : k - kFar - kNear;
      const Complex<T> power_of_l = power<T>(terms[j].a, l);
      if (is_far)
        far[j][k] = Complex<T>{static_cast<T>(terms[j].w.re), static_cast<T>(terms[j].w.im)} * power_of_l;
      else if (is_near)
        near[j][k - kFar] = power_of_l;
      else
        table[j][k - kFar - kNear] = power_of_l;
    }
    __syncthreads();
    if (first < length) {
      for (int j = 0; j < count; ++j) {
        const Complex<T> w = far[j][threadIdx.x / kNear] * near[j][threadIdx.x % kNear];
#pragma unroll
        for (int t = 0; t < kTile; t += 2) {
          Complex<T> p, q;
          load_two(p, q, &table[j][t]);
          sum[t] += w.re * p.re;
          sum[t + 1] += w.re * q.re;
          sum[t] -= w.im * p.im;
          sum[t + 1] -= w.im * q.im;
        }
      }
    }
    __syncthreads();
  }
  if (first + kTile <= length && length * sizeof(T) % 16 == 0) {
    store_values(K + c * length + first, sum);
    return;
  }
#pragma unroll
  for (int t = 0; t < kTile; ++t)
    if (first + t < length) K[c * length + first + t] = sum[t];
}

// Block (channel, chunk of kStates states): a lane has a state, a warp a piece of the positions. g = dK from position 1
// on: with m = l - 1, sum g_m A_bar^m and sum m g_m A_bar^m, which give the gradients also at A_bar = 0. A warp walks
// down its piece; kStep positions are summed with a table of powers in registers, the steps by Horner's rule in double.
// Bound by the multiply-adds: 4 h n l.
template <class T>
__global__ void __launch_bounds__(kWarps * 32, 2)
    backward_kernel(T* dC, double* contributions, const T* __restrict__ dK, Channels<T> channels, int64_t length) {
  __shared__ __align__(16) T staged[kWarps][kSpan];
  __shared__ Complex64 zeroths[kWarps][kStates], moments[kWarps][kStates];
  const int64_t c = blockIdx.x, n = channels.n, j = int64_t{blockIdx.y} * kStates + threadIdx.x % 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const S4dState s = channels.state(c, min(j, n - 1));
  Complex<T> table[kStep];
  Complex64 step{1, 0};  // A_bar^kStep
#pragma unroll
  for (int t = 0; t < kStep; ++t) {
    table[t] = {static_cast<T>(step.re), static_cast<T>(step.im)};
    step = step * s.A_bar;
  }
  const T* g = dK + c * length + 1;
  const int64_t count = length - 1, spans = (count + kSpan - 1) / kSpan, own = (spans + kWarps - 1) / kWarps;
  const int64_t begin = min(warp * own, spans) * kSpan, end = min((warp + 1) * own, spans) * kSpan;
  T* values = staged[warp];
  T next[kSpan / 32];
  const auto fetch = [&](int64_t m0) {
#pragma unroll
    for (int k = 0; k < kSpan / 32; ++k) {
      const int64_t m = m0 + lane + 32 * k;
      next[k] = m0 >= begin && m < count ? g[m] : T(0);
    }
  };
  Complex64 zeroth{0, 0}, moment{0, 0};  // with exponents from `begin` on
  fetch(end - kSpan);
  for (int64_t m0 = end - kSpan; m0 >= begin; m0 -= kSpan) {
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kSpan / 32; ++k) values[lane + 32 * k] = next[k];
    __syncwarp();
    fetch(m0 - kSpan);
#pragma unroll 1
    for (int at = kSpan - kStep; at >= 0; at -= kStep) {
      T part[kStep];
      load_values(part, values + at);
      Complex<T> s0{0, 0}, s1{0, 0};  // s1 takes s0 once for each position from 1 on: t times the term of t
#pragma unroll
      for (int t = kStep - 1; t >= 0; --t) {
        s0 = {s0.re + part[t] * table[t].re, s0.im + part[t] * table[t].im};
        if (t > 0) s1 = s1 + s0;
      }
      const T from = static_cast<T>(m0 - begin + at);
      s1 = {s1.re + from * s0.re, s1.im + from * s0.im};
      zeroth = zeroth * step + Complex64{static_cast<double>(s0.re), static_cast<double>(s0.im)};
      moment = moment * step + Complex64{static_cast<double>(s1.re), static_cast<double>(s1.im)};
    }
  }
  const Complex64 w = power<double>(polar(s.A_bar), begin);
  zeroths[warp][lane] = w * zeroth;
  moments[warp][lane] = w * (moment + static_cast<double>(begin) * zeroth);
  __syncthreads();
  if (warp != 0 || j >= n) return;
  zeroth = moment = {0, 0};
  for (int k = 0; k < kWarps; ++k) {
    zeroth = zeroth + zeroths[k][lane];
    moment = moment + moments[k][lane];
  }
  const Complex64 B = load_complex(channels.B, channels.at(c, j)), C = load_complex(channels.C, c * n + j);
  const Complex64 dA_bar = 2.0 * conj(C * (s.f * B) * (zeroth + moment));
  Complex64 whole = s.A_bar * zeroth;
  whole.re += static_cast<double>(dK[c * length]);
  store_complex(dC, c * n + j,
                s4d_chain(contributions + (c * n + j) * kS4dGradients, s, B, C, 2.0 * conj(whole), dA_bar,
                          channels.zoh));
}

template <class T, int kTile, int kThreads>
void forward(Tensor& K, const S4dParameters& p, bool zoh) {
  const int64_t h = K.size(0), length = K.size(1), n = p.log_A_re.size(1);
  const Stream stream = current_stream(K.device());
  const Tensor room = empty({h, n, static_cast<int64_t>(sizeof(Term) / sizeof(double))}, DType::f64, K.device());
  Term* terms = reinterpret_cast<Term*>(room.data<double>());
  launch(terms_kernel<T>, {.grid = ceil_div(h * n, 64), .block = 64, .stream = stream}, terms, channels_of<T>(p, zoh), h);
  launch(forward_kernel<T, kTile, kThreads>,
         {.grid = h, .grid_y = ceil_div(length, kThreads * kTile), .block = kThreads, .stream = stream}, K.data<T>(),
         terms, n, length);
}

}  // namespace

void s4d_kernel_forward(Tensor& K, const S4dParameters& p, bool zoh) {
  if (K.dtype() == DType::f64)
    forward<double, 8, 128>(K, p, zoh);
  else if (K.size(1) > 2048)
    forward<float, 16, 256>(K, p, zoh);
  else
    forward<float, 8, 128>(K, p, zoh);  // short: more threads
}

void s4d_kernel_backward(Tensor& dC, Tensor& contributions, const Tensor& dK, const S4dParameters& p, bool zoh) {
  const int64_t h = dK.size(0), length = dK.size(1), n = p.log_A_re.size(1);
  visit_wide(dK.dtype(), [&]<class T>() {
    launch(backward_kernel<T>,
           {.grid = h, .grid_y = ceil_div(n, kStates), .block = kWarps * 32, .stream = current_stream(dK.device())},
           dC.data<T>(), contributions.data<double>(), dK.data<T>(), channels_of<T>(p, zoh), length);
  });
}

}  // namespace krait::kernels::cuda

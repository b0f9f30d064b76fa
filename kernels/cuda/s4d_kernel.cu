// Positions split as l = kTile p + t: A_bar^l = A_bar^(kTile p) A_bar^t. The first factor is made once per (state, p)
// from the exponential, its angle in turns reduced in double; the second comes from a table in shared memory, so that
// the inner loops are multiply-adds. States pass through shared memory in chunks; nothing of size h n l exists.
#include "core/cuda/launch.cuh"
#include "kernels/cuda/fft.cuh"
#include "kernels/s4d_math.h"
#include "kernels/ssm_gradients.h"

namespace krait::kernels::cuda {

namespace {

constexpr int kTile = 16;     // positions of a thread
constexpr int kThreads = 64;  // of the forward: a block makes kThreads * kTile positions
constexpr int kStates = 32;   // of a chunk
constexpr int kWarps = 8;     // of the backward: one state each

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

// Block (channel, piece of the positions); thread p makes kTile positions.
template <class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(T* K, Channels<T> channels, int64_t length) {
  __shared__ Complex<T> coefficient[kStates], table[kStates][kTile];
  __shared__ Polar polars[kStates];
  const int64_t c = blockIdx.x, first = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * kTile;
  T sum[kTile] = {};
  for (int64_t j0 = 0; j0 < channels.n; j0 += kStates) {
    const int count = static_cast<int>(min(int64_t{kStates}, channels.n - j0));
    for (int j = threadIdx.x; j < count; j += kThreads) {
      const S4dState s = channels.state(c, j0 + j);
      const Complex64 B = load_complex(channels.B, channels.at(c, j0 + j));
      const Complex64 w = 2.0 * (load_complex(channels.C, c * channels.n + j0 + j) * (s.f * B));
      coefficient[j] = {static_cast<T>(w.re), static_cast<T>(w.im)};
      polars[j] = polar(s.A_bar);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * kTile; i += kThreads) table[i / kTile][i % kTile] = power<T>(polars[i / kTile], i % kTile);
    __syncthreads();
    if (first < length) {
      for (int j = 0; j < count; ++j) {
        const Complex<T> w = coefficient[j] * power<T>(polars[j], first);
#pragma unroll
        for (int t = 0; t < kTile; ++t) sum[t] += w.re * table[j][t].re - w.im * table[j][t].im;
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int t = 0; t < kTile; ++t)
    if (first + t < length) K[c * length + first + t] = sum[t];
}

// Block (channel, chunk of kWarps states), one warp a state. g = dK from position 1 on: with m = l - 1,
// sum g_m A_bar^m and sum m g_m A_bar^m, which give the gradients also at A_bar = 0.
template <class T>
__global__ void __launch_bounds__(kWarps * 32)
    backward_kernel(T* dC, double* contributions, const T* dK, Channels<T> channels, int64_t length) {
  __shared__ Complex<T> tables[kWarps][kTile];
  const int64_t c = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t j = int64_t{blockIdx.y} * kWarps + warp, n = channels.n;
  if (j >= n) return;  // whole warps; no barrier of the block follows
  const S4dState s = channels.state(c, j);
  const Polar a = polar(s.A_bar);
  if (lane < kTile) tables[warp][lane] = power<T>(a, lane);
  __syncwarp();
  const Complex<T>* table = tables[warp];
  const T* g = dK + c * length + 1;
  const int64_t count = length - 1;
  Complex64 zeroth{0, 0}, moment{0, 0};
  for (int64_t m0 = int64_t{lane} * kTile; m0 < count; m0 += 32 * kTile) {
    Complex<T> s0{0, 0}, s1{0, 0};
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
      const T value = m0 + t < count ? g[m0 + t] : T(0), moved = static_cast<T>(t) * value;
      s0 = {s0.re + value * table[t].re, s0.im + value * table[t].im};
      s1 = {s1.re + moved * table[t].re, s1.im + moved * table[t].im};
    }
    const Complex<T> w = power<T>(a, m0);
    const Complex<T> p0 = w * s0, p1 = w * s1;
    const Complex64 q0{static_cast<double>(p0.re), static_cast<double>(p0.im)};
    const Complex64 q1{static_cast<double>(p1.re), static_cast<double>(p1.im)};
    zeroth = zeroth + q0;
    moment = moment + q1 + static_cast<double>(m0) * q0;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    zeroth.re += __shfl_xor_sync(0xFFFFFFFFu, zeroth.re, offset);
    zeroth.im += __shfl_xor_sync(0xFFFFFFFFu, zeroth.im, offset);
    moment.re += __shfl_xor_sync(0xFFFFFFFFu, moment.re, offset);
    moment.im += __shfl_xor_sync(0xFFFFFFFFu, moment.im, offset);
  }
  if (lane != 0) return;
  const Complex64 B = load_complex(channels.B, channels.at(c, j)), C = load_complex(channels.C, c * n + j);
  const Complex64 dA_bar = 2.0 * conj(C * (s.f * B) * (zeroth + moment));
  Complex64 whole = s.A_bar * zeroth;
  whole.re += static_cast<double>(dK[c * length]);
  store_complex(dC, c * n + j,
                s4d_chain(contributions + (c * n + j) * kS4dGradients, s, B, C, 2.0 * conj(whole), dA_bar,
                          channels.zoh));
}

}  // namespace

void s4d_kernel_forward(Tensor& K, const S4dParameters& p, bool zoh) {
  const int64_t h = K.size(0), length = K.size(1);
  visit_wide(K.dtype(), [&]<class T>() {
    launch(forward_kernel<T>,
           {.grid = h, .grid_y = ceil_div(length, kThreads * kTile), .block = kThreads, .stream = current_stream(K.device())},
           K.data<T>(), channels_of<T>(p, zoh), length);
  });
}

void s4d_kernel_backward(Tensor& dC, Tensor& contributions, const Tensor& dK, const S4dParameters& p, bool zoh) {
  const int64_t h = dK.size(0), length = dK.size(1), n = p.log_A_re.size(1);
  visit_wide(dK.dtype(), [&]<class T>() {
    launch(backward_kernel<T>,
           {.grid = h, .grid_y = ceil_div(n, kWarps), .block = kWarps * 32, .stream = current_stream(dK.device())},
           dC.data<T>(), contributions.data<double>(), dK.data<T>(), channels_of<T>(p, zoh), length);
  });
}

}  // namespace krait::kernels::cuda

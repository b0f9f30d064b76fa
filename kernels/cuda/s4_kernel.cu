// One thread per node of the unit circle sums over the states (forward and the first half of the backward); one lane
// per state sums over a share of the nodes (second half). fp64: see kernels/s4_kernel.h. Channels are taken in chunks that bound
// the workspace.
#include "kernels/s4_kernel.h"

#include <algorithm>

#include "kernels/cuda/chirp_dft.cuh"
#include "kernels/cuda/multiprocessors.h"
#include "kernels/s4_math.h"
#include "kernels/ssm_gradients.h"
#include "kernels/visit_wide.h"

namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kStates = 32;  // of a chunk in shared memory
constexpr int kWarps = 8;  // of the states' gradients
constexpr int64_t kWorkspace = int64_t{128} << 20;

template <class T>
struct Parameters {
  const T *log_dt, *log_A_re, *A_im, *P, *B, *C;
  int64_t n, group;
  template <int R>
  __device__ S4State<R> state(int64_t h, int64_t j) const {
    return s4_state<R>(log_dt, log_A_re, A_im, P, B, C, h, h / group, j, n);
  }
};

template <class T>
Parameters<T> parameters_of(const S4Parameters& p) {
  return {p.log_dt.data<T>(), p.log_A_re.data<T>(), p.A_im.data<T>(), p.P.data<T>(), p.B.data<T>(),
          p.C_tilde.data<T>(), p.log_A_re.size(1),  p.log_dt.size(0) / p.log_A_re.size(0)};
}

struct Node {
  double s, c;  // 2 sin and cos of half its angle
};
__device__ __forceinline__ Node node_of(int64_t k, int64_t length) {
  Node node;
  sincospi(static_cast<double>(k) / static_cast<double>(length), &node.s, &node.c);
  node.s *= 2.0;
  return node;
}

// 1 / D of a state at a node.
__device__ __forceinline__ Complex64 reciprocal(double alpha, double beta, Node node) {
  const double u = -node.c * alpha, v = node.c * beta;
  const double re = u * u + (v - node.s) * (v + node.s), im = 2.0 * u * node.s;
  const double scale = 1.0 / (re * re + im * im);
  return {re * scale, -im * scale};
}

template <int R>
struct StateChunk {
  double alpha[kStates], beta[kStates], p[kStates][S4State<R>::kSums], q[kStates][S4State<R>::kSums];
};

// R(left_a, right_b) of channel h at the thread's node. Called by whole blocks.
template <int R, class T>
__device__ void node_sums(Complex64* sums, StateChunk<R>& chunk, const Parameters<T>& p, int64_t h, Node node) {
  constexpr int kSums = S4State<R>::kSums;
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = {0, 0};
  for (int64_t j0 = 0; j0 < p.n; j0 += kStates) {
    const int count = static_cast<int>(min(int64_t{kStates}, p.n - j0));
    __syncthreads();
    if (threadIdx.x < count) {
      const int j = threadIdx.x;
      const S4State<R> state = p.template state<R>(h, j0 + j);
      chunk.alpha[j] = state.alpha;
      chunk.beta[j] = state.beta;
      for (int i = 0; i < kSums; ++i) {
        chunk.p[j][i] = state.p[i];
        chunk.q[j][i] = state.q[i];
      }
    }
    __syncthreads();
    for (int j = 0; j < count; ++j) {
      const Complex64 w = reciprocal(chunk.alpha[j], chunk.beta[j], node);
      const Complex64 cw = node.c * w, sw = node.s * w;
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        sums[i].re += chunk.p[j][i] * cw.re - chunk.q[j][i] * sw.im;
        sums[i].im += chunk.p[j][i] * cw.im + chunk.q[j][i] * sw.re;
      }
    }
  }
}

// Block (piece of the nodes, channel h0 + y). K_hat (rows, bins).
template <int R, class T>
__global__ void __launch_bounds__(kThreads)
    spectrum_kernel(Complex64* K_hat, Parameters<T> p, int64_t h0, int64_t length, int64_t bins) {
  __shared__ StateChunk<R> chunk;
  const int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const Node node = node_of(min(k, bins - 1), length);
  Complex64 sums[S4State<R>::kSums];
  node_sums<R>(sums, chunk, p, h0 + blockIdx.y, node);
  if (k >= bins) return;
  K_hat[int64_t{blockIdx.y} * bins + k] = Complex64{node.c, 0.5 * node.s} * s4_woodbury<R>(sums, node.c);
}

// The gradients of the sums (rows, kSums, bins) from those of K_hat (rows, bins).
template <int R, class T>
__global__ void __launch_bounds__(kThreads)
    spectrum_backward_kernel(Complex64* dsums, const Complex64* dK_hat, Parameters<T> p, int64_t h0, int64_t length,
                             int64_t bins) {
  __shared__ StateChunk<R> chunk;
  constexpr int kSums = S4State<R>::kSums;
  const int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x, row = blockIdx.y;
  const Node node = node_of(min(k, bins - 1), length);
  Complex64 sums[kSums], d[kSums];
  node_sums<R>(sums, chunk, p, h0 + row, node);
  if (k >= bins) return;
  s4_woodbury_backward<R>(d, sums, node.c, Complex64{node.c, -0.5 * node.s} * dK_hat[row * bins + k]);
#pragma unroll
  for (int i = 0; i < kSums; ++i) dsums[(row * kSums + i) * bins + k] = d[i];
}

template <int R>
constexpr int kStateSums = 2 * S4State<R>::kSums + 2;  // dp, dq, dalpha, dbeta

// Block (channel h0 + x, chunk of 32 states, piece of the nodes): a lane has a state, the warps share the nodes, whose
// sine and cosine are made once for all states. partials (pieces, rows, kStateSums, n). Bound by fp64: about 90
// multiply-adds for each state and node with rank 1.
template <int R, class T>
__global__ void __launch_bounds__(kWarps * 32)
    states_backward_kernel(double* partials, const Complex64* __restrict__ dsums, Parameters<T> p, int64_t h0,
                           int64_t length, int64_t bins) {
  constexpr int kSums = S4State<R>::kSums, kValues = kStateSums<R>;
  __shared__ Node nodes[kWarps][32];
  __shared__ double totals[kWarps][kValues][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = blockIdx.x, j = int64_t{blockIdx.y} * 32 + lane;
  const S4State<R> state = p.template state<R>(h0 + row, min(j, p.n - 1));
  double sums[kValues] = {};
  const int64_t begin = bins * blockIdx.z / gridDim.z, end = bins * (blockIdx.z + 1) / gridDim.z;
  for (int64_t k0 = begin + warp * 32; k0 < end; k0 += kWarps * 32) {
    __syncwarp();
    nodes[warp][lane] = node_of(min(k0 + lane, bins - 1), length);
    __syncwarp();
    const int count = static_cast<int>(min(int64_t{32}, end - k0));
    for (int k = 0; k < count; ++k) {
      const Node node = nodes[warp][k];
      const Complex64 w = reciprocal(state.alpha, state.beta, node);
      const Complex64 cw = node.c * w, sw = node.s * w;
      Complex64 dw{0, 0};
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const Complex64 d = dsums[(row * kSums + i) * bins + k0 + k];
        sums[i] += cw.re * d.re + cw.im * d.im;
        sums[kSums + i] += sw.re * d.im - sw.im * d.re;
        dw = dw + Complex64{node.c * state.p[i], -node.s * state.q[i]} * d;
      }
      const Complex64 dD = conj(w * w) * dw;  // negative: W = 1/D
      const double u = -node.c * state.alpha, v = node.c * state.beta;
      sums[2 * kSums] += 2.0 * node.c * (u * dD.re + node.s * dD.im);
      sums[2 * kSums + 1] -= 2.0 * node.c * v * dD.re;
    }
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) totals[warp][i][lane] = sums[i];
  __syncthreads();
  if (warp != 0 || j >= p.n) return;
  partials += (int64_t{blockIdx.z} * gridDim.x + row) * kValues * p.n + j;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    double total = sums[i];
    for (int k = 1; k < kWarps; ++k) total += totals[k][i][lane];
    partials[i * p.n] = total;
  }
}

// A thread per state of `rows` channels from h0 on: the pieces in their order, then the chain rule.
template <int R, class T>
__global__ void __launch_bounds__(kThreads)
    states_chain_kernel(T* dC, double* contributions, const double* __restrict__ partials, Parameters<T> p, int64_t h0,
                        int64_t rows, int64_t pieces) {
  constexpr int kSums = S4State<R>::kSums, kValues = kStateSums<R>;
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= rows * p.n) return;
  const int64_t row = at / p.n, j = at % p.n, h = h0 + row;
  double sums[kValues] = {};
  for (int64_t piece = 0; piece < pieces; ++piece)
#pragma unroll
    for (int i = 0; i < kValues; ++i) sums[i] += partials[((piece * rows + row) * kValues + i) * p.n + j];
  store_complex(dC, h * p.n + j,
                s4_chain<R>(contributions + (h * p.n + j) * S4State<R>::kGradients, p.template state<R>(h, j), sums,
                            sums + kSums, sums[2 * kSums], sums[2 * kSums + 1]));
}

// irfft: bins in, real positions out.
struct LoadSpectrum {
  const Complex64* K_hat;
  int64_t length, bins;
  __device__ Complex64 operator()(int64_t row, int64_t k) const {
    const double weight = k == 0 || 2 * k == length ? 1.0 : 2.0;  // the others stand for their conjugates too
    return weight * K_hat[row * bins + k];
  }
};
template <class T>
struct StoreKernel {
  T* K;
  int64_t length;
  __device__ void operator()(int64_t row, int64_t l, Complex64 value) const {
    K[row * length + l] = static_cast<T>(value.re / static_cast<double>(length));
  }
};

// Its gradient: real positions in, bins out.
template <class T>
struct LoadGradient {
  const T* dK;
  int64_t length;
  __device__ Complex64 operator()(int64_t row, int64_t l) const {
    return {static_cast<double>(dK[row * length + l]), 0.0};
  }
};
struct StoreSpectrum {
  Complex64* dK_hat;
  int64_t length, bins;
  __device__ void operator()(int64_t row, int64_t k, Complex64 value) const {
    const double weight = k == 0 || 2 * k == length ? 1.0 : 2.0;
    dK_hat[row * bins + k] = (weight / static_cast<double>(length)) * value;
  }
};

Complex64* complex_data(const Tensor& t) { return reinterpret_cast<Complex64*>(t.data<double>()); }

// Channels of a chunk, when each needs `values` complex numbers.
int64_t chunk_of(int64_t h, int64_t values) {
  return std::clamp<int64_t>(kWorkspace / (values * static_cast<int64_t>(sizeof(Complex64))), 1, std::min<int64_t>(h, 65535));
}

// Long kernels leave few channels in a chunk: their nodes are then shared by several blocks. At least 64 nodes a warp.
int64_t node_pieces(int64_t blocks, int64_t bins) {
  return std::clamp<int64_t>(std::min(ceil_div(4 * kMultiprocessors, blocks), bins / (kWarps * 64)), 1, 65535);
}

template <int R, class T>
void forward(Tensor& K, const S4Parameters& parameters) {
  const int64_t h = K.size(0), length = K.size(1), bins = length / 2 + 1;
  const Parameters<T> p = parameters_of<T>(parameters);
  const int64_t rows = chunk_of(h, bins + any_dft_workspace(length, bins, length));
  const Tensor K_hat = empty({rows, bins, 2}, DType::f64, K.device());
  const Stream stream = current_stream(K.device());
  for (int64_t h0 = 0; h0 < h; h0 += rows) {
    const int64_t count = std::min(rows, h - h0);
    launch(spectrum_kernel<R, T>, {.grid = ceil_div(bins, kThreads), .grid_y = count, .block = kThreads, .stream = stream},
           complex_data(K_hat), p, h0, length, bins);
    any_dft(length, bins, length, +1, count, LoadSpectrum{complex_data(K_hat), length, bins},
            StoreKernel<T>{K.data<T>() + h0 * length, length}, K.device());
  }
}

template <int R, class T>
void backward(Tensor& dC, Tensor& contributions, const Tensor& dK, const S4Parameters& parameters) {
  constexpr int kSums = S4State<R>::kSums;
  const int64_t h = dK.size(0), length = dK.size(1), bins = length / 2 + 1;
  const Parameters<T> p = parameters_of<T>(parameters);
  const int64_t rows = chunk_of(h, (1 + kSums) * bins + any_dft_workspace(length, length, bins));
  const Tensor dK_hat = empty({rows, bins, 2}, DType::f64, dK.device());
  const Tensor dsums = empty({rows, kSums, bins, 2}, DType::f64, dK.device());
  const int64_t pieces = node_pieces(rows * ceil_div(p.n, 32), bins);
  const Tensor partials = empty({pieces, rows, kStateSums<R>, p.n}, DType::f64, dK.device());
  const Stream stream = current_stream(dK.device());
  for (int64_t h0 = 0; h0 < h; h0 += rows) {
    const int64_t count = std::min(rows, h - h0);
    any_dft(length, length, bins, -1, count, LoadGradient<T>{dK.data<T>() + h0 * length, length},
            StoreSpectrum{complex_data(dK_hat), length, bins}, dK.device());
    launch(spectrum_backward_kernel<R, T>,
           {.grid = ceil_div(bins, kThreads), .grid_y = count, .block = kThreads, .stream = stream},
           complex_data(dsums), static_cast<const Complex64*>(complex_data(dK_hat)), p, h0, length, bins);
    launch(states_backward_kernel<R, T>,
           {.grid = count, .grid_y = ceil_div(p.n, 32), .grid_z = pieces, .block = kWarps * 32, .stream = stream},
           partials.data<double>(), static_cast<const Complex64*>(complex_data(dsums)), p, h0, length, bins);
    launch(states_chain_kernel<R, T>, {.grid = ceil_div(count * p.n, kThreads), .block = kThreads, .stream = stream},
           dC.data<T>(), contributions.data<double>(), static_cast<const double*>(partials.data<double>()), p, h0, count, pieces);
  }
}

}  // namespace

void s4_kernel_forward(Tensor& K, const S4Parameters& p) {
  visit_wide(K.dtype(), [&]<class T>() {
    if (p.P.size(1) == 1)
      forward<1, T>(K, p);
    else
      forward<2, T>(K, p);
  });
}

void s4_kernel_backward(Tensor& dC_tilde, Tensor& contributions, const Tensor& dK, const S4Parameters& p) {
  visit_wide(dK.dtype(), [&]<class T>() {
    if (p.P.size(1) == 1)
      backward<1, T>(dC_tilde, contributions, dK, p);
    else
      backward<2, T>(dC_tilde, contributions, dK, p);
  });
}

}  // namespace krait::kernels::cuda

#include "kernels/mamba2_step.h"

#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/rows_queue.h"
#include "kernels/cuda/step_rows.h"
#include "kernels/cuda/step_values.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kChannels = 16;  // channels of a head that a block advances
constexpr int kNormThreads = 512;

struct Layout {
  int64_t heads, p, n, g, k;
  int64_t e, channels, input;  // inner width; of the convolution; of a row of zxbcdt
  int64_t D_columns;           // 1 or p
};

template <class T, class A = accum_t<T>>
__device__ A convolved(const T* conv, const T* x, const T* weight, const T* bias, int64_t c, const Layout& d) {
  A p = bias != nullptr ? static_cast<A>(bias[c]) : A(0);
  for (int64_t j = 0; j + 1 < d.k; ++j) p += static_cast<A>(weight[c * d.k + j]) * static_cast<A>(conv[j * d.channels + c]);
  p += static_cast<A>(weight[c * d.k + d.k - 1]) * static_cast<A>(x[c]);
  return static_cast<A>(static_cast<T>(silu_of(p)));
}

// A block: kChannels channels of one head of one row. It convolves what it needs; a warp advances one channel at a
// time, its lanes the states. Bound by reading and writing h.
template <class T>
__global__ void __launch_bounds__(kThreads)
    state_kernel(T* u, accum_t<T>* h, const T* conv, const T* zxbcdt, const T* conv_weight, const T* conv_bias,
                 const accum_t<T>* dt_bias, const accum_t<T>* A_log, const accum_t<T>* D, accum_t<T> low, accum_t<T> high,
                 int64_t tiles, Layout d) {
  using A = accum_t<T>;
  extern __shared__ unsigned char shared[];
  A* const B = reinterpret_cast<A*>(shared);  // (n)
  A* const C = B + d.n;                       // (n)
  A* const x = C + d.n;                       // (kChannels)
  const int64_t tile = blockIdx.x % tiles, head = blockIdx.x / tiles, row = blockIdx.y;
  const int64_t group = head / (d.heads / d.g), first = tile * kChannels;
  const int count = static_cast<int>(min(int64_t{kChannels}, d.p - first));
  let_next_begin();
  if (threadIdx.x == 0) {
    bring_into_l2(h + ((row * d.heads + head) * d.p + first) * d.n, count * d.n * static_cast<int64_t>(sizeof(A)));
    bring_into_l2(conv_weight + (d.e + group * d.n) * d.k, d.n * d.k * static_cast<int64_t>(sizeof(T)));
    bring_into_l2(conv_weight + (d.e + (d.g + group) * d.n) * d.k, d.n * d.k * static_cast<int64_t>(sizeof(T)));
  }
  wait_for_previous();
  conv += row * (d.k - 1) * d.channels;
  const T* const in = zxbcdt + row * d.input;
  const T* const xbc = in + d.e;
  for (int64_t j = threadIdx.x; j < d.n; j += kThreads) {
    B[j] = convolved(conv, xbc, conv_weight, conv_bias, d.e + group * d.n + j, d);
    C[j] = convolved(conv, xbc, conv_weight, conv_bias, d.e + (d.g + group) * d.n + j, d);
  }
  if (threadIdx.x < count) x[threadIdx.x] = convolved(conv, xbc, conv_weight, conv_bias, head * d.p + first + threadIdx.x, d);
  const A raw = static_cast<A>(in[d.e + d.channels + head]) + dt_bias[head];
  const A dt = min(max(softplus_of(raw), low), high);
  const A decay = exp(-exp(A_log[head]) * dt);
  __syncthreads();
  for (int c = static_cast<int>(threadIdx.x) / 32; c < count; c += kWarps) {
    A* const state = h + ((row * d.heads + head) * d.p + first + c) * d.n;
    const A add = dt * x[c];
    A sum = 0;
#pragma unroll 4
    for (int64_t j = threadIdx.x % 32; j < d.n; j += 32) {
      const A now = decay * state[j] + add * B[j];
      state[j] = now;
      sum += now * C[j];
    }
    sum = sum_lanes<32>(sum);
    if (threadIdx.x % 32 == 0)
      u[row * d.e + head * d.p + first + c] = static_cast<T>(sum + D[d.D_columns == 1 ? head : head * d.p + first + c] * x[c]);
  }
}

// One block a row: the gated norm, and the convolution's state moves on by one.
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    norm_kernel(T* y, T* conv, const T* u, const T* zxbcdt, const accum_t<T>* w, accum_t<T> eps, bool norm_first, Layout d) {
  using A = accum_t<T>;
  __shared__ A shared[32];
  const int64_t row = blockIdx.x, width = d.e / d.g;
  take_over();
  const T* const z = zxbcdt + row * d.input;
  u += row * d.e;
  y += row * d.e;
  conv += row * (d.k - 1) * d.channels;
  for (int64_t g = 0; g < d.g; ++g) {
    A sum = 0;
    for (int64_t j = g * width + threadIdx.x; j < (g + 1) * width; j += kNormThreads) {
      A v = static_cast<A>(u[j]);
      if (!norm_first) v *= silu_of(static_cast<A>(z[j]));
      sum += v * v;
    }
    sum = block_reduce(sum, shared, [](A a, A b) { return a + b; });
    const A scale = A(1) / sqrt(sum / static_cast<A>(width) + eps);
    for (int64_t j = g * width + threadIdx.x; j < (g + 1) * width; j += kNormThreads)
      y[j] = static_cast<T>(static_cast<A>(u[j]) * silu_of(static_cast<A>(z[j])) * scale * w[j]);
  }
  for (int64_t c = threadIdx.x; c < d.channels; c += kNormThreads) {
    for (int64_t j = 0; j + 2 < d.k; ++j) conv[j * d.channels + c] = conv[(j + 1) * d.channels + c];
    if (d.k > 1) conv[(d.k - 2) * d.channels + c] = z[d.e + c];
  }
}

}  // namespace

void mamba2_step(Tensor& y, Tensor& conv, Tensor& h, RecentPositions* recent, const Tensor& zxbcdt, const Mamba2StepWeights& w) {
  if (gather_rows_mamba2_step(y, conv, h, recent, zxbcdt, w)) return;
  if ((recent != nullptr || h.size(0) > kFewRows) && mamba2_step_rows(y, conv, h, recent, zxbcdt, w)) return;
  KRAIT_CHECK(recent == nullptr, "mamba2_step: a state {} behind its positions is not served", describe(h));
  Layout d{h.size(1), h.size(2), h.size(3), 1, w.conv_weight.size(1), h.size(1) * h.size(2), w.conv_weight.size(0), zxbcdt.size(1),
           w.D.ndim() == 1 ? 1 : h.size(2)};
  d.g = (d.channels - d.e) / (2 * d.n);
  const int64_t rows = h.size(0), tiles = ceil_div(d.p, kChannels);
  const Stream stream = current_stream(h.device());
  visit_float(zxbcdt.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Tensor u = empty({rows, d.e}, zxbcdt.dtype(), zxbcdt.device());
    launch_overlapped(state_kernel<T>,
                      {.grid = d.heads * tiles, .grid_y = rows, .block = kThreads,
                       .shared = (2 * d.n + kChannels) * static_cast<int64_t>(sizeof(A)), .stream = stream},
                      u.data<T>(), h.data<A>(), conv.data<T>(), zxbcdt.data<T>(), w.conv_weight.data<T>(),
                      w.conv_bias.defined() ? w.conv_bias.data<T>() : nullptr, w.dt_bias.data<A>(), w.A_log.data<A>(),
                      w.D.data<A>(), w.dt_low, w.dt_high, tiles, d);
    launch_overlapped(norm_kernel<T>, {.grid = rows, .block = kNormThreads, .stream = stream}, y.data<T>(), conv.data<T>(),
                      u.data<T>(), zxbcdt.data<T>(), w.norm_weight.data<A>(), w.eps, w.norm_first, d);
  });
}

}  // namespace krait::kernels::cuda

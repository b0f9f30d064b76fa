#include "kernels/mamba_step.h"

#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/rows_queue.h"
#include "kernels/cuda/step_rows.h"
#include "kernels/cuda/step_values.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kProjectThreads = 256, kOutputs = 4;  // two warps an output
constexpr int kLanes = 4;                           // threads of a channel in the scan
constexpr int kVector = 8;                          // channels that a thread convolves at a time

// x~ of one channel, rounded like the convolution's output.
template <class T, class A = accum_t<T>>
__device__ A convolved(const T* conv, T x, const T* weight, const T* bias, int64_t c, int64_t e, int k) {
  A p = bias != nullptr ? static_cast<A>(bias[c]) : A(0);
  for (int j = 0; j + 1 < k; ++j) p += static_cast<A>(weight[c * k + j]) * static_cast<A>(conv[j * e + c]);
  p += static_cast<A>(weight[c * k + k - 1]) * static_cast<A>(x);
  return static_cast<A>(static_cast<T>(silu_of(p)));
}

// The same for kVector channels and filters of four taps.
template <class T, class A = accum_t<T>>
__device__ void convolved_vector(T* mixed, const T* conv, const T* x, const T* weight, const T* bias, int64_t c, int64_t e) {
  A p[kVector] = {}, in[kVector], taps[4 * kVector];
  if (bias != nullptr) load_values(p, bias + c);
  load_values(taps, weight + 4 * c);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    load_values(in, j < 3 ? conv + j * e + c : x + c);
#pragma unroll
    for (int v = 0; v < kVector; ++v) p[v] += taps[4 * v + j] * in[v];
  }
#pragma unroll
  for (int v = 0; v < kVector; ++v) mixed[c + v] = static_cast<T>(silu_of(p[v]));
}

// dbc = x_proj x~: a block makes x~ of its row whole, then two warps share an output.
template <class T>
__global__ void __launch_bounds__(kProjectThreads)
    project_kernel(T* dbc, const T* xz, const T* conv, const T* conv_weight, const T* conv_bias, const T* x_proj, int64_t e,
                   int64_t outputs, int k, bool vectors) {
  using A = accum_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  T* const mixed = reinterpret_cast<T*>(shared);  // (e)
  __shared__ A half[2 * kOutputs];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t row = blockIdx.y, output = int64_t{blockIdx.x} * kOutputs + warp / 2;
  let_next_begin();
  if (lane == 0 && warp % 2 == 0 && output < outputs) bring_into_l2(x_proj + output * e, e * static_cast<int64_t>(sizeof(T)));
  if (threadIdx.x == 32) bring_into_l2(conv_weight, e * k * static_cast<int64_t>(sizeof(T)));
  wait_for_previous();
  xz += row * 2 * e;
  conv += row * (k - 1) * e;
  if (vectors) {
    for (int64_t c = int64_t{threadIdx.x} * kVector; c < e; c += kProjectThreads * kVector)
      convolved_vector(mixed, conv, xz, conv_weight, conv_bias, c, e);
  } else {
    for (int64_t c = threadIdx.x; c < e; c += kProjectThreads)
      mixed[c] = static_cast<T>(convolved(conv, xz[c], conv_weight, conv_bias, c, e, k));
  }
  __syncthreads();
  A sum = 0;
  if (output < outputs) {
    const T* weight = x_proj + output * e;
    const int64_t begin = warp % 2 * 32 + lane;
    if (vectors) {
      for (int64_t c = begin * kVector; c < e; c += 64 * kVector) {
        A w[kVector], m[kVector];
        load_values(w, weight + c);
        load_values(m, mixed + c);
#pragma unroll
        for (int v = 0; v < kVector; ++v) sum += w[v] * m[v];
      }
    } else {
      for (int64_t c = begin; c < e; c += 64) sum += static_cast<A>(weight[c]) * static_cast<A>(mixed[c]);
    }
  }
  sum = sum_lanes<32>(sum);
  if (lane == 0) half[warp] = sum;
  __syncthreads();
  if (lane == 0 && warp % 2 == 0 && output < outputs) dbc[row * outputs + output] = static_cast<T>(half[warp] + half[warp + 1]);
}

// kLanes threads a channel: the convolution again, which advances its state, the time step, h and y.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scan_kernel(T* y, T* conv, accum_t<T>* h, const T* xz, const T* dbc, const T* conv_weight, const T* conv_bias,
                const T* dt_proj, const accum_t<T>* dt_bias, const accum_t<T>* A_log, const accum_t<T>* D, int64_t rows,
                int64_t e, int n, int r, int k, bool vectors) {
  using A = accum_t<T>;
  const int64_t at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  let_next_begin();
  if (constexpr int64_t count = kThreads / kLanes; threadIdx.x == 0 && at + count <= rows * e) {
    const int64_t from = at % e, size = sizeof(T), wide = sizeof(A);
    bring_into_l2(h + at * n, count * n * wide);
    if (from + count <= e) {
      bring_into_l2(dt_proj + from * r, count * r * size);
      bring_into_l2(A_log + from * n, count * n * wide);
    }
  }
  wait_for_previous();
  const bool alive = at < rows * e;  // whole groups; the shuffles below want all lanes
  const int64_t row = alive ? at / e : 0, c = alive ? at % e : 0;
  xz += row * 2 * e;
  conv += row * (k - 1) * e;
  dbc += row * (r + 2 * n);
  const A x = convolved(conv, xz[c], conv_weight, conv_bias, c, e, k);
  A dt = 0;
  if (vectors) {
    for (int j = lane * kVector; j < r; j += kLanes * kVector) {
      A weights[kVector], d[kVector];
      load_values(weights, dt_proj + c * r + j);
      load_values(d, dbc + j);
#pragma unroll
      for (int v = 0; v < kVector; ++v) dt += weights[v] * d[v];
    }
  } else {
    for (int j = lane; j < r; j += kLanes) dt += static_cast<A>(dt_proj[c * r + j]) * static_cast<A>(dbc[j]);
  }
  dt = sum_lanes<kLanes>(dt);
  const A delta = softplus_of(static_cast<A>(static_cast<T>(dt)) + dt_bias[c]);
  A sum = 0;
  for (int j = lane; alive && j < n; j += kLanes) {
    A* const state = h + (row * e + c) * n + j;
    const A now = exp(-delta * exp(A_log[c * n + j])) * *state + delta * static_cast<A>(dbc[r + j]) * x;
    *state = now;
    sum += now * static_cast<A>(dbc[r + n + j]);
  }
  sum = sum_lanes<kLanes>(sum);
  __syncwarp();  // all lanes have read the convolution's state
  if (!alive || lane != 0) return;
  y[row * e + c] = static_cast<T>((sum + D[c] * x) * silu_of(static_cast<A>(xz[e + c])));
  for (int j = 0; j + 2 < k; ++j) conv[j * e + c] = conv[(j + 1) * e + c];
  if (k > 1) conv[(k - 2) * e + c] = xz[c];
}

}  // namespace

void mamba_step(Tensor& y, Tensor& conv, Tensor& h, const Tensor& xz, const MambaStepWeights& w) {
  if (gather_rows_mamba_step(y, conv, h, xz, w)) return;
  if (xz.size(0) > kFewRows && mamba_step_rows(y, conv, h, xz, w)) return;
  const int64_t rows = xz.size(0), e = w.A_log.size(0), n = w.A_log.size(1), r = w.dt_proj.size(1), outputs = r + 2 * n;
  const int k = static_cast<int>(w.conv_weight.size(1));
  const Stream stream = current_stream(xz.device());
  visit_float(xz.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Tensor dbc = empty({rows, outputs}, xz.dtype(), xz.device());
    const T* bias = w.conv_bias.defined() ? w.conv_bias.data<T>() : nullptr;
    const bool vectors = k == 4 && e % kVector == 0 && aligned16(xz.data<T>(), conv.data<T>(), w.conv_weight.data<T>(), bias, w.x_proj.data<T>());
    launch_overlapped(project_kernel<T>,
                      {.grid = ceil_div(outputs, kOutputs), .grid_y = rows, .block = kProjectThreads,
                       .shared = e * static_cast<int64_t>(sizeof(T)), .stream = stream},
                      dbc.data<T>(), xz.data<T>(), conv.data<T>(), w.conv_weight.data<T>(), bias, w.x_proj.data<T>(), e,
                      outputs, k, vectors);
    const bool pieces = r % kVector == 0 && outputs % kVector == 0 && aligned16(w.dt_proj.data<T>());
    launch_overlapped(scan_kernel<T>, {.grid = ceil_div(rows * e * kLanes, kThreads), .block = kThreads, .stream = stream},
                      y.data<T>(), conv.data<T>(), h.data<A>(), xz.data<T>(), dbc.data<T>(), w.conv_weight.data<T>(), bias,
                      w.dt_proj.data<T>(), w.dt_bias.data<A>(), w.A_log.data<A>(), w.D.data<A>(), rows, e,
                      static_cast<int>(n), static_cast<int>(r), k, pieces);
  });
}

}  // namespace krait::kernels::cuda

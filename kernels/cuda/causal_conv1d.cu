#include "kernels/cuda/causal_conv1d.cuh"
#include "kernels/cuda/overlap.cuh"

// Any filter: a thread walks along a tile of positions of one channel with the last kWidth inputs in registers;
// neighbouring threads have neighbouring channels. Filters wider than 8 re-read their inputs. Filters of width 4 over
// whole vectors of channels have kernels of their own (causal_conv1d_four.cu).
namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 128;

// The filter of one channel, right-aligned in kWidth places, and the last kWidth inputs.
template <int kWidth, class A>
struct Window {
  A w[kWidth], x[kWidth], bias;
  int first;  // place of the oldest tap

  template <class T>
  __device__ void start(const ConvInputs<T>& in, const ConvLine<T>& line, int64_t channel, int64_t t0) {
    first = kWidth - in.k;
    bias = in.bias == nullptr ? A(0) : in.bias[channel];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      w[j] = j >= first ? in.weight[channel * in.k + j - first] : A(0);
      x[j] = 0;
    }
#pragma unroll
    for (int j = 0; j + 1 < kWidth; ++j)  // the place of position t0 - kWidth + 1 + j, once t0 was pushed
      if (j >= first) x[j + 1] = line.template input<A>(t0 - kWidth + 1 + j, t0);
  }
  __device__ void push(A value) {
#pragma unroll
    for (int j = 0; j + 1 < kWidth; ++j) x[j] = x[j + 1];
    x[kWidth - 1] = value;
  }
  __device__ void forget() {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) x[j] = 0;
  }
  __device__ A filter() const {
    A p = bias;
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      if (j >= first) p += w[j] * x[j];
    return p;
  }
};

template <class T, int kWidth, class A = accum_t<T>>
__global__ void __launch_bounds__(kThreads)
    conv_forward_kernel(T* __restrict__ y, T* __restrict__ final_state, const ConvInputs<T> in, int64_t tiles, int64_t tile) {
  const int64_t channel = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  if (channel >= in.c) return;
  const int64_t row = int64_t{blockIdx.x} / tiles, t0 = int64_t{blockIdx.x} % tiles * tile;
  const int64_t t1 = t0 + tile < in.l ? t0 + tile : in.l;
  const ConvLine<T> line = in.line(row, channel);
  y += row * in.l * in.c + channel;
  if constexpr (kWidth > 0) {
    Window<kWidth, A> window;
    window.start(in, line, channel, t0);
    for (int64_t t = t0; t < t1; ++t) {
      if (t > t0 && !line.together(t - 1, t)) window.forget();
      window.push(static_cast<A>(line.x[t * line.stride]));
      const A p = window.filter();
      y[t * in.c] = static_cast<T>(in.silu ? silu_of(p) : p);
    }
  } else {
    for (int64_t t = t0; t < t1; ++t) {
      A p = in.bias == nullptr ? A(0) : in.bias[channel];
      for (int j = 0; j < in.k; ++j)
        p += in.weight[channel * in.k + j] * line.template input<A>(t - in.k + 1 + j, t);
      y[t * in.c] = static_cast<T>(in.silu ? silu_of(p) : p);
    }
  }
  if (t1 < in.l) return;
  for (int i = 0; i < in.k - 1; ++i)
    final_state[(row * (in.k - 1) + i) * in.c + channel] =
        static_cast<T>(line.template input<A>(in.l - in.k + 1 + i, in.l - 1));
}

// partial (b tiles, k + 1, c): k rows of dweight and one of dbias.
template <class T, int kWidth, class A = accum_t<T>>
__global__ void __launch_bounds__(kThreads)
    conv_backward_kernel(const ConvGradients<T> grad, A* __restrict__ partial, const ConvInputs<T> in, int64_t tiles,
                         int64_t tile) {
  const int64_t channel = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  if (channel >= in.c) return;
  const int64_t row = int64_t{blockIdx.x} / tiles, t0 = int64_t{blockIdx.x} % tiles * tile;
  const int64_t t1 = t0 + tile < in.l ? t0 + tile : in.l;
  const int64_t seen = t1 + in.k - 1 < in.l ? t1 + in.k - 1 : in.l;  // positions that see the tile's inputs
  const int64_t oldest = t0 > 0 ? t0 : int64_t{1} - in.k;            // first input whose gradient this tile stores
  const ConvLine<T> line = in.line(row, channel);
  const T* dy = grad.dy + row * grad.dy_batch + channel;
  Window<kWidth, A> window;
  window.start(in, line, channel, t0);
  A dw[kWidth] = {}, db = 0, dx[kWidth] = {};  // dx[j]: of the input at place j of the window
  // Documents end: from how far back t may still be seen.
  int back = 0;
  for (int j = 1; j < in.k && line.together(t0 - j, t0); ++j) back = j;
  for (int64_t t = t0; t < seen; ++t) {
    if (t > t0) {
      back = back + 1 < in.k - 1 ? back + 1 : in.k - 1;
      if (!line.together(t - 1, t)) {
        window.forget();
        back = 0;
      }
    }
    window.push(static_cast<A>(line.x[t * line.stride]));
#pragma unroll
    for (int j = 0; j + 1 < kWidth; ++j) dx[j] = dx[j + 1];
    dx[kWidth - 1] = 0;
    A g = static_cast<A>(dy[t * grad.dy_row]);
    if (in.silu) g *= silu_slope(window.filter());
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      if (j >= window.first && kWidth - 1 - j <= back) dx[j] += window.w[j] * g;
    if (t < t1) {
      db += g;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) dw[j] += g * window.x[j];
    }
    const int64_t s = t - in.k + 1;
    if (s >= oldest && s < t1) {
      A d = 0;
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        if (j == window.first) d = dx[j];
      grad.store(line, row, channel, s, d);
    }
  }
  // Inputs that no later position sees: the last ones of the sequence.
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const int64_t s = seen - kWidth + j;
    if (j > window.first && s >= oldest && s < t1) grad.store(line, row, channel, s, dx[j]);
  }
  A* sums = partial + int64_t{blockIdx.x} * (in.k + 1) * in.c + channel;
#pragma unroll
  for (int j = 0; j < kWidth; ++j)
    if (j >= window.first) sums[int64_t{j - window.first} * in.c] = dw[j];
  sums[int64_t{in.k} * in.c] = db;
}

// Any width: p is computed again for each of the k uses of a gradient.
template <class T, class A = accum_t<T>>
__global__ void __launch_bounds__(kThreads)
    conv_backward_wide_kernel(const ConvGradients<T> grad, A* __restrict__ partial, const ConvInputs<T> in, int64_t tiles,
                              int64_t tile) {
  const int64_t channel = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  if (channel >= in.c) return;
  const int64_t row = int64_t{blockIdx.x} / tiles, t0 = int64_t{blockIdx.x} % tiles * tile;
  const int64_t t1 = t0 + tile < in.l ? t0 + tile : in.l;
  const ConvLine<T> line = in.line(row, channel);
  const T* dy = grad.dy + row * grad.dy_batch + channel;
  const A* w = in.weight + channel * in.k;
  const auto gradient = [&](int64_t t) {
    A g = static_cast<A>(dy[t * grad.dy_row]);
    if (!in.silu) return g;
    A p = in.bias == nullptr ? A(0) : in.bias[channel];
    for (int j = 0; j < in.k; ++j) p += w[j] * line.template input<A>(t - in.k + 1 + j, t);
    return g * silu_slope(p);
  };
  for (int64_t s = t0 > 0 ? t0 : int64_t{1} - in.k; s < t1; ++s) {
    A d = 0;
    for (int64_t t = s < 0 ? 0 : s; t < s + in.k && t < in.l; ++t)
      if (line.together(s, t)) d += w[s + in.k - 1 - t] * gradient(t);
    grad.store(line, row, channel, s, d);
  }
  A* sums = partial + int64_t{blockIdx.x} * (in.k + 1) * in.c + channel;
  for (int j = 0; j <= in.k; ++j) sums[j * in.c] = 0;
  for (int64_t t = t0; t < t1; ++t) {
    const A g = gradient(t);
    for (int j = 0; j < in.k; ++j) sums[j * in.c] += g * line.template input<A>(t - in.k + 1 + j, t);
    sums[int64_t{in.k} * in.c] += g;
  }
}

// Sums partial over its first dimension in a fixed order. Block (32, 16) for 32 channels; blockIdx.y is the tap, the
// last one the bias.
template <class A>
__global__ void sum_taps_kernel(A* dweight, bool add_dweight, A* dbias, bool add_dbias, const A* partial, int64_t pieces,
                                int64_t c, int k) {
  __shared__ A part[16][33];
  const int tx = static_cast<int>(threadIdx.x) % 32, ty = static_cast<int>(threadIdx.x) / 32;
  const int tap = static_cast<int>(blockIdx.y);
  const int64_t channel = int64_t{blockIdx.x} * 32 + tx;
  take_over();
  A s = 0;
  if (channel < c)
#pragma unroll 8
    for (int64_t i = ty; i < pieces; i += 16) s += partial[(i * (k + 1) + tap) * c + channel];
  part[ty][tx] = s;
  __syncthreads();
  if (ty != 0 || channel >= c) return;
  for (int i = 1; i < 16; ++i) s += part[i][tx];
  if (tap < k) {
    A& to = dweight[channel * k + tap];
    to = add_dweight ? to + s : s;
  } else if (dbias != nullptr) {
    dbias[channel] = add_dbias ? dbias[channel] + s : s;
  }
}

// Positions per tile: short enough to fill the device, long enough that partial sums stay small.
int64_t tile_of(int64_t b, int64_t l) { return std::min(l, std::max<int64_t>(64, ceil_div(b * l, 2048))); }

}  // namespace

void sum_conv_taps(Tensor& dweight, bool add_dweight, Tensor& dbias, bool add_dbias, const Tensor& partial) {
  const int64_t c = partial.size(2), taps = partial.size(1);
  const auto run = [&]<class A>(A /*zero*/) {
    launch_overlapped(sum_taps_kernel<A>,
                      {.grid = ceil_div(c, 32), .grid_y = taps, .block = 512, .stream = current_stream(partial.device())},
                      dweight.data<A>(), add_dweight, conv_pointer<A>(dbias), add_dbias, partial.data<A>(), partial.size(0),
                      c, static_cast<int>(taps - 1));
  };
  if (partial.dtype() == DType::f64)
    run(double{});
  else
    run(float{});
}

void causal_conv1d_forward(Tensor& y, Tensor& final_state, const CausalConv1dInputs& in) {
  if (conv_four_forward(y, final_state, in)) return;
  const int64_t b = in.x.size(0), l = in.x.size(1), c = in.x.size(2), k = in.weight.size(1);
  const int64_t tile = tile_of(b, l), tiles = ceil_div(l, tile);
  const LaunchConfig config{.grid = b * tiles, .grid_y = ceil_div(c, kThreads), .block = kThreads,
                            .stream = current_stream(in.x.device())};
  visit_float(in.x.dtype(), [&]<class T>() {
    const auto kernel = k <= 4   ? conv_forward_kernel<T, 4>
                        : k <= 8 ? conv_forward_kernel<T, 8>
                                 : conv_forward_kernel<T, 0>;
    launch(kernel, config, y.data<T>(), conv_pointer<T>(final_state), conv_inputs<T>(in), tiles, tile);
  });
}

void causal_conv1d_backward(Tensor& dx, Tensor& dinitial, Tensor& dweight, bool add_dweight, Tensor& dbias,
                            bool add_dbias, const Tensor& dy, const Tensor& dfinal, const CausalConv1dInputs& in) {
  if (conv_four_backward(dx, dinitial, dweight, add_dweight, dbias, add_dbias, dy, dfinal, in)) return;
  const int64_t b = in.x.size(0), l = in.x.size(1), c = in.x.size(2), k = in.weight.size(1);
  const int64_t tile = tile_of(b, l), tiles = ceil_div(l, tile);
  const Stream stream = current_stream(in.x.device());
  visit_float(in.x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Tensor partial = empty({b * tiles, k + 1, c}, dtype_of<A>, in.x.device());
    const ConvGradients<T> grad = conv_gradients<T>(dx, dinitial, dy, dfinal);
    const auto kernel = k <= 4   ? conv_backward_kernel<T, 4>
                        : k <= 8 ? conv_backward_kernel<T, 8>
                                 : conv_backward_wide_kernel<T>;
    launch(kernel,
           {.grid = b * tiles, .grid_y = ceil_div(c, kThreads), .block = kThreads, .stream = stream}, grad,
           partial.data<A>(), conv_inputs<T>(in), tiles, tile);
    sum_conv_taps(dweight, add_dweight, dbias, add_dbias, partial);
  });
}

}  // namespace krait::kernels::cuda

#include "kernels/gated_cnn_step.h"

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/step_known.h"

namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kAhead = 8;  // inputs before, read at a time

// A thread: one channel of one row. Bound by latency.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gated_cnn_step_kernel(T* __restrict__ y, T* __restrict__ conv, const T* __restrict__ projected, const T* __restrict__ weight,
                          const T* __restrict__ bias, int f, int c, int taps) {
  using A = accum_t<T>;
  const int channel = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.y;
  take_over();
  if (channel >= f) return;
  const T* const in = projected + row * 2 * f;
  const A gate = GeluErf::at(static_cast<A>(in[channel])).value;
  const T now = in[f + channel];
  A up = static_cast<A>(now);
  if (const int of_conv = channel - (f - c); of_conv >= 0) {
    T* const past = conv + row * (taps - 1) * c + of_conv;
    const T* const filter = weight + int64_t{of_conv} * taps;
    A sum = static_cast<A>(bias[of_conv]);
    for (int first = 0; first + 1 < taps; first += kAhead) {
      T before[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (first + i + 1 < taps) before[i] = past[int64_t{first + i} * c];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int k = first + i;
        if (k + 1 >= taps) break;
        sum += static_cast<A>(filter[k]) * static_cast<A>(before[i]);
        if (k > 0) past[int64_t{k - 1} * c] = before[i];
      }
    }
    sum += static_cast<A>(filter[taps - 1]) * up;
    if (taps > 1) past[int64_t{taps - 2} * c] = now;
    up = static_cast<A>(static_cast<T>(sum));  // rounded, as between the operations for sequences
  }
  y[row * f + channel] = static_cast<T>(gate * up);
}

}  // namespace

void gated_cnn_step(bool& done, Tensor& y, Tensor& conv, const Tensor& projected, const Tensor& weight, const Tensor& bias) {
  const int64_t rows = y.size(0), f = y.size(1);
  done = rows < 65536 && f < (1 << 30);
  if (!done) return;
  visit_float(y.dtype(), [&]<class T>() {
    launch_overlapped(gated_cnn_step_kernel<T>,
                      {.grid = ceil_div(f, kThreads), .grid_y = rows, .block = kThreads, .stream = current_stream(y.device())},
                      y.data<T>(), conv.data<T>(), projected.data<T>(), weight.data<T>(), bias.data<T>(), static_cast<int>(f),
                      static_cast<int>(weight.size(0)), static_cast<int>(weight.size(1)));
  });
  known_to_step(y);
}

}  // namespace krait::kernels::cuda

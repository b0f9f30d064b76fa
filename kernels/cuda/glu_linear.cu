#include "kernels/glu_linear.h"

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/aligned.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/step_known.h"

namespace krait::kernels::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kMaxRows = 8;
constexpr int kAhead = 4;  // 16-byte pieces of a row of weights in flight, the first of them before the kernels in front end

// A warp: one output of all rows, from its row of weights and its gate's. Bound by reading the weights once.
template <class T, int kRows>
__global__ void __launch_bounds__(32 * kWarps)
    glu_linear_kernel(T* y, const T* x, const T* w, const T* bias, int rows, int64_t n, int64_t k) {
  constexpr int V = 16 / sizeof(T);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t at = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32, out = min(at, n - 1), pieces = k / V;
  Packed<T, V> ahead[kAhead][2];
  const auto load = [&](int64_t start) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (start + i * 32 < pieces) ahead[i][half].load(w + (half * n + out) * k + (start + i * 32) * V);
  };
  let_next_begin();
  load(lane);
  wait_for_previous();
  float sums[kRows][2] = {};
  for (int64_t start = lane; start < pieces; start += 32 * kAhead) {
    if (start != lane) load(start);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (start + i * 32 >= pieces) break;
      float weights[2][V];
      ahead[i][0].unpack(weights[0]);
      ahead[i][1].unpack(weights[1]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) break;
        float in[V];
        load_values(in, x + r * k + (start + i * 32) * V);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          sums[r][0] = fmaf(in[v], weights[0][v], sums[r][0]);
          sums[r][1] = fmaf(in[v], weights[1][v], sums[r][1]);
        }
      }
    }
  }
  if (at >= n) return;
  const float shift = bias != nullptr ? static_cast<float>(bias[out]) : 0.0f, gate_shift = bias != nullptr ? static_cast<float>(bias[n + out]) : 0.0f;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float a = sums[r][0], g = sums[r][1];
    for (int offset = 16; offset > 0; offset /= 2) {
      a += __shfl_xor_sync(0xffffffffu, a, offset);
      g += __shfl_xor_sync(0xffffffffu, g, offset);
    }
    a = static_cast<float>(static_cast<T>(a + shift));
    g = static_cast<float>(static_cast<T>(g + gate_shift));
    if (lane == 0 && r < rows) y[r * n + out] = static_cast<T>(a * Sigmoid::at(g).value);
  }
}

}  // namespace

void glu_linear(bool& done, Tensor& y, const Tensor& x, const Tensor& w, const Tensor& bias) {
  const int64_t rows = x.size(0), k = x.size(1), n = y.size(1);
  done = rows <= kMaxRows && (x.dtype() == DType::bf16 || x.dtype() == DType::f32) && k % (16 / size_of(x.dtype())) == 0 && aligned(x, w);
  if (!done) return;
  const auto run = [&]<class T, int kRows>() {
    launch_overlapped(glu_linear_kernel<T, kRows>, {.grid = ceil_div(n, kWarps), .block = 32 * kWarps, .stream = current_stream(x.device())},
                      y.data<T>(), x.data<T>(), w.data<T>(), pointer_or_null<T>(bias), static_cast<int>(rows), n, k);
  };
  const auto of_dtype = [&]<class T>() {
    if (rows == 1) return run.template operator()<T, 1>();
    if (rows <= 4) return run.template operator()<T, 4>();
    run.template operator()<T, 8>();
  };
  if (x.dtype() == DType::bf16)
    of_dtype.template operator()<bf16>();
  else
    of_dtype.template operator()<float>();
  known_to_step(y);
}

}  // namespace krait::kernels::cuda

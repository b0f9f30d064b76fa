#include "kernels/ssd_time_step.h"

#include "core/cuda/launch.cuh"
#include "kernels/cuda/aligned.h"

// Bound by memory, and small: 2 + 8 bytes for each position and head in bf16.
namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 256, kHeads = 32;

template <class A>
struct Step {
  A s, step, sigmoid;
  __device__ Step(A u, A low, A high) {
    const A e = exp(-fabs(u));
    s = (u > A(0) ? u : A(0)) + log1p(e);
    step = s < low ? low : s > high ? high : s;
    sigmoid = u > A(0) ? A(1) / (A(1) + e) : e / (A(1) + e);
  }
};

template <class T, class A = accum_t<T>>
__global__ void step_forward_kernel(A* step, A* a, const T* dt, const A* bias, const A* A_log, int64_t count, int64_t h,
                                    int64_t row, A low, A high) {
  const int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (at >= count) return;
  const int64_t k = at % h;
  const Step<A> of(static_cast<A>(dt[at / h * row + k]) + bias[k], low, high);
  step[at] = of.step;
  a[at] = -exp(A_log[k]) * of.step;
}

// Thread (y, x) of (8, 32) goes through rows y, y + 8, ... of the block's for head x of 32 (blockIdx.y).
// partial (2, blocks, h): sums for bias and A_log.
template <class T, class A = accum_t<T>>
__global__ void __launch_bounds__(kThreads)
    step_backward_kernel(T* ddt, A* partial, const A* dstep, const A* da, const T* dt, const A* bias, const A* A_log,
                         int64_t r, int64_t h, int64_t row, int64_t to_row, int64_t rows, A low, A high) {
  __shared__ A sums[2][kThreads];
  const int64_t k = int64_t{blockIdx.y} * kHeads + threadIdx.x % kHeads;
  const int64_t first = int64_t{blockIdx.x} * rows, end = first + rows < r ? first + rows : r;
  A of_bias = 0, of_A = 0;
  if (k < h) {
    const A b = bias[k], scale = -exp(A_log[k]);
#pragma unroll 4
    for (int64_t i = first + threadIdx.x / kHeads; i < end; i += kThreads / kHeads) {
      const Step<A> of(static_cast<A>(dt[i * row + k]) + b, low, high);
      const A up = da != nullptr ? da[i * h + k] : A(0);
      const bool inside = of.s >= low && of.s <= high;
      const A g = inside ? ((dstep != nullptr ? dstep[i * h + k] : A(0)) + scale * up) * of.sigmoid : A(0);
      ddt[i * to_row + k] = static_cast<T>(g);
      of_bias += g;
      of_A += scale * up * of.step;
    }
  }
  sums[0][threadIdx.x] = of_bias;
  sums[1][threadIdx.x] = of_A;
  __syncthreads();
  if (threadIdx.x >= 2 * kHeads) return;
  const int which = threadIdx.x / kHeads, x = threadIdx.x % kHeads;
  const int64_t to = int64_t{blockIdx.y} * kHeads + x;
  A sum = 0;
  for (int y = 0; y < kThreads / kHeads; ++y) sum += sums[which][y * kHeads + x];
  if (to < h) partial[(which * int64_t{gridDim.x} + blockIdx.x) * h + to] = sum;
}

// The sums over blocks of partial (2, blocks, h), in a fixed order. Block (32, 16) for 32 heads; blockIdx.y: which of the
// two.
template <class A>
__global__ void sum_steps_kernel(A* dbias, A* dA_log, const A* partial, int64_t blocks, int64_t h) {
  __shared__ A part[16][kHeads];
  const int x = static_cast<int>(threadIdx.x) % kHeads, y = static_cast<int>(threadIdx.x) / kHeads;
  const int64_t k = int64_t{blockIdx.x} * kHeads + x;
  A s = 0;
  if (k < h)
#pragma unroll 8
    for (int64_t i = y; i < blocks; i += 16) s += partial[(blockIdx.y * blocks + i) * h + k];
  part[y][x] = s;
  __syncthreads();
  if (y != 0 || k >= h) return;
  for (int i = 1; i < 16; ++i) s += part[i][x];
  (blockIdx.y == 0 ? dbias : dA_log)[k] = s;
}

}  // namespace

void ssd_time_step_forward(Tensor& step, Tensor& a, const Tensor& dt, const Tensor& bias, const Tensor& A_log, double low,
                           double high) {
  visit_float(dt.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    launch(step_forward_kernel<T>,
           {.grid = ceil_div(dt.numel(), kThreads), .block = kThreads, .stream = current_stream(dt.device())},
           step.data<A>(), a.data<A>(), dt.data<T>(), bias.data<A>(), A_log.data<A>(), dt.numel(), dt.size(1),
           dt.stride(0), low, high);
  });
}

void ssd_time_step_backward(Tensor& ddt, Tensor& dbias, Tensor& dA_log, const Tensor& dstep, const Tensor& da,
                            const Tensor& dt, const Tensor& bias, const Tensor& A_log, double low, double high) {
  const int64_t r = dt.size(0), h = dt.size(1);
  const int64_t rows = std::max<int64_t>(64, ceil_div(r, 1024)), blocks = ceil_div(r, rows);
  visit_float(dt.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Tensor partial = empty({2, blocks, h}, dtype_of<A>, dt.device());
    launch(step_backward_kernel<T>,
           {.grid = blocks, .grid_y = ceil_div(h, kHeads), .block = kThreads, .stream = current_stream(dt.device())},
           ddt.data<T>(), partial.data<A>(), pointer_or_null<A>(dstep), pointer_or_null<A>(da), dt.data<T>(), bias.data<A>(),
           A_log.data<A>(), r, h, dt.stride(0), ddt.stride(0), rows, low, high);
    launch(sum_steps_kernel<A>,
           {.grid = ceil_div(h, kHeads), .grid_y = 2, .block = 16 * kHeads, .stream = current_stream(dt.device())},
           dbias.data<A>(), dA_log.data<A>(), partial.data<A>(), blocks, h);
  });
}

}  // namespace krait::kernels::cuda

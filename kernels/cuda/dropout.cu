#include "kernels/dropout.h"

#include "core/cuda/launch.cuh"
#include "kernels/cuda/dropout.cuh"

namespace krait::kernels::cuda {

namespace {

// One run whose Philox blocks are the tensor's groups of four: a thread moves a whole group.
// Bound by memory: the ten rounds hide behind it for fp32 and cost about as much as the traffic of bf16.
template <class T>
__global__ void dropout_fours_kernel(Four<T>* y, const Four<T>* x, const Four<T>* residual, int64_t fours,
                                     int64_t first, uint64_t key, const int64_t* step, uint32_t threshold,
                                     accum_t<T> scale) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= fours) return;
  const Four<T> in = x[i];
  Four<T> base{}, out;
  if (residual) base = residual[i];
  const Philox words = philox(key, static_cast<uint64_t>(first + i), static_cast<uint64_t>(*step));
#pragma unroll
  for (int w = 0; w < 4; ++w)
    out.value[w] = dropped(words.word[w], threshold, in.value[w], residual ? &base.value[w] : nullptr, scale);
  y[i] = out;
}

// A thread makes one Philox block and serves the four elements that it numbers, the first and last block of a
// run partly.
template <class T>
__global__ void dropout_kernel(T* y, const T* x, const T* residual, int64_t n, int64_t run, int64_t offset,
                               int64_t runs, int64_t run_stride, int64_t group_stride, uint64_t key,
                               const int64_t* step, uint32_t threshold, accum_t<T> scale) {
  const auto now = static_cast<uint64_t>(*step);
  // (run + 6) / 4 blocks are the most that a run reaches into.
  const int64_t blocks = (run + 6) / 4, last = n / run * blocks, stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t item = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; item < last; item += stride) {
    const int64_t r = run == n ? 0 : item / blocks;
    const int64_t start = run == n ? offset : DropoutMask::start(r, offset, runs, run_stride, group_stride);
    const int64_t block = start / 4 + item - r * blocks;
    if (block * 4 >= start + run) continue;
    const Philox words = philox(key, static_cast<uint64_t>(block), now);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int64_t c = block * 4 + w - start, i = r * run + c;
      if (c < 0 || c >= run) continue;
      y[i] = dropped(words.word[w], threshold, x[i], residual ? residual + i : nullptr, scale);
    }
  }
}

}  // namespace

void dropout(Tensor& y, const Tensor& x, const Tensor& residual, const DropoutMask& mask) {
  const int64_t n = x.numel(), run = mask.run_of(n);
  visit_float(x.dtype(), [&]<class T>() {
    const T* add = residual.defined() ? residual.data<T>() : nullptr;
    if (in_fours(mask, n, y.data<T>(), x.data<T>(), add)) {
      launch(dropout_fours_kernel<T>, {.grid = ceil_div(n / 4, 256), .stream = current_stream(x.device())},
             fours(y.data<T>()), fours(x.data<T>()), fours(add), n / 4, mask.offset / 4, mask.key,
             mask.step.data<int64_t>(), dropout_threshold(mask.p), 1.0 / (1.0 - mask.p));
      return;
    }
    launch(dropout_kernel<T>,
           {.grid = std::min<int64_t>(ceil_div(n / run * ((run + 6) / 4), 256), 132 * 16),
            .stream = current_stream(x.device())},
           y.data<T>(), x.data<T>(), add, n, run, mask.offset, mask.runs, mask.run_stride, mask.group_stride, mask.key,
           mask.step.data<int64_t>(), dropout_threshold(mask.p), 1.0 / (1.0 - mask.p));
  });
}

}  // namespace krait::kernels::cuda

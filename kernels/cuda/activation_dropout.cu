#include "kernels/activation_dropout.h"

#include "core/cuda/launch.cuh"
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/dropout.cuh"

namespace krait::kernels::cuda {

namespace {

// A thread moves what one Philox block numbers. Bound by memory: forward 2 n, backward 3 n values.
template <class T, class Fn>
__global__ void forward_kernel(Four<T>* y, const Four<T>* x, int64_t count, int64_t first, uint64_t key,
                               const int64_t* step, uint32_t threshold, accum_t<T> scale) {
  using A = accum_t<T>;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const Four<T> in = x[i];
  const Philox words = philox(key, static_cast<uint64_t>(first + i), static_cast<uint64_t>(*step));
  Four<T> out;
#pragma unroll
  for (int w = 0; w < 4; ++w)
    out.value[w] = static_cast<T>((words.word[w] >> 8) < threshold ? A(0)
                                                                   : Fn::at(static_cast<A>(in.value[w])).value * scale);
  y[i] = out;
}

template <class T, class Fn>
__global__ void backward_kernel(Four<T>* dx, const Four<T>* dy, const Four<T>* x, int64_t count, int64_t first,
                                uint64_t key, const int64_t* step, uint32_t threshold, accum_t<T> scale) {
  using A = accum_t<T>;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const Four<T> in = x[i], d = dy[i];
  const Philox words = philox(key, static_cast<uint64_t>(first + i), static_cast<uint64_t>(*step));
  Four<T> out;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const A kept = (words.word[w] >> 8) < threshold ? A(0) : static_cast<A>(d.value[w]) * scale;
    out.value[w] = static_cast<T>(kept * Fn::at(static_cast<A>(in.value[w])).slope);
  }
  dx[i] = out;
}

}  // namespace

void activation_dropout_forward(Tensor& y, const Tensor& x, Activation f, const DropoutMask& mask) {
  const int64_t n = x.numel();
  visit_float(x.dtype(), [&]<class T>() {
    if (!in_fours(mask, n, y.data<T>(), x.data<T>())) {
      Tensor values = empty_like(x);
      activation_forward(values, x, f);
      dropout(y, values, {}, mask);
      return;
    }
    visit_activation(f, [&]<class Fn>() {
      launch(forward_kernel<T, Fn>, {.grid = ceil_div(n / 4, 256), .stream = current_stream(x.device())},
             fours(y.data<T>()), fours(x.data<T>()), n / 4, mask.offset / 4, mask.key, mask.step.data<int64_t>(),
             dropout_threshold(mask.p), 1.0 / (1.0 - mask.p));
    });
  });
}

void activation_dropout_backward(Tensor& dx, const Tensor& dy, const Tensor& x, Activation f, const DropoutMask& mask) {
  const int64_t n = x.numel();
  visit_float(x.dtype(), [&]<class T>() {
    if (!in_fours(mask, n, dx.data<T>(), dy.data<T>(), x.data<T>())) {
      Tensor kept = empty_like(dy);
      dropout(kept, dy, {}, mask);
      activation_backward(dx, kept, x, f);
      return;
    }
    visit_activation(f, [&]<class Fn>() {
      launch(backward_kernel<T, Fn>, {.grid = ceil_div(n / 4, 256), .stream = current_stream(x.device())},
             fours(dx.data<T>()), fours(dy.data<T>()), fours(x.data<T>()), n / 4, mask.offset / 4, mask.key,
             mask.step.data<int64_t>(), dropout_threshold(mask.p), 1.0 / (1.0 - mask.p));
    });
  });
}

}  // namespace krait::kernels::cuda

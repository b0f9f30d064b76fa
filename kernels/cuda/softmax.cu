#include "kernels/softmax.h"

#include "core/cuda/launch.cuh"
#include "kernels/cuda/block_reduce.cuh"

namespace krait::kernels::cuda {

// One block per row; later passes read the row from cache. Bound by memory: (inputs + 1) r c sizeof(T) bytes.

namespace {

int block_for(int64_t c) { return c <= 128 ? 32 : c <= 1024 ? 128 : 256; }

LaunchConfig rows_of(const Tensor& x) {
  return {.grid = x.size(0), .block = block_for(x.size(1)), .stream = current_stream(x.device())};
}

template <class T>
__device__ accum_t<T> row_max(const T* x, int64_t c, accum_t<T>* shared) {
  using A = accum_t<T>;
  A m = -A(INFINITY);
  for (int64_t k = threadIdx.x; k < c; k += blockDim.x) {
    const A v = static_cast<A>(x[k]);
    m = m > v ? m : v;
  }
  return block_reduce(m, shared, [](A a, A b) { return a > b ? a : b; });
}

template <class T>
__device__ accum_t<T> row_sum_exp(const T* x, int64_t c, accum_t<T> m, accum_t<T>* shared) {
  using A = accum_t<T>;
  A s = 0;
  for (int64_t k = threadIdx.x; k < c; k += blockDim.x) s += ::exp(static_cast<A>(x[k]) - m);
  return block_reduce(s, shared, [](A a, A b) { return a + b; });
}

}  // namespace

template <class T>
__global__ void softmax_forward_kernel(T* y, const T* x, int64_t c) {
  using A = accum_t<T>;
  __shared__ A shared[32];
  x += int64_t{blockIdx.x} * c;
  y += int64_t{blockIdx.x} * c;
  const A m = row_max(x, c, shared);
  const A scale = A(1) / row_sum_exp(x, c, m, shared);
  for (int64_t k = threadIdx.x; k < c; k += blockDim.x) y[k] = static_cast<T>(::exp(static_cast<A>(x[k]) - m) * scale);
}

template <class T>
__global__ void log_softmax_forward_kernel(T* y, const T* x, int64_t c) {
  using A = accum_t<T>;
  __shared__ A shared[32];
  x += int64_t{blockIdx.x} * c;
  y += int64_t{blockIdx.x} * c;
  const A m = row_max(x, c, shared);
  const A log_s = ::log(row_sum_exp(x, c, m, shared));
  for (int64_t k = threadIdx.x; k < c; k += blockDim.x) y[k] = static_cast<T>(static_cast<A>(x[k]) - m - log_s);
}

template <class T>
__global__ void softmax_backward_kernel(T* dx, const T* dy, const T* y, int64_t c) {
  using A = accum_t<T>;
  __shared__ A shared[32];
  const int64_t row = int64_t{blockIdx.x} * c;
  A dot = 0;
  for (int64_t k = threadIdx.x; k < c; k += blockDim.x) dot += static_cast<A>(dy[row + k]) * static_cast<A>(y[row + k]);
  dot = block_reduce(dot, shared, [](A a, A b) { return a + b; });
  for (int64_t k = threadIdx.x; k < c; k += blockDim.x)
    dx[row + k] = static_cast<T>(static_cast<A>(y[row + k]) * (static_cast<A>(dy[row + k]) - dot));
}

template <class T>
__global__ void log_softmax_backward_kernel(T* dx, const T* dy, const T* y, int64_t c) {
  using A = accum_t<T>;
  __shared__ A shared[32];
  const int64_t row = int64_t{blockIdx.x} * c;
  A total = 0;
  for (int64_t k = threadIdx.x; k < c; k += blockDim.x) total += static_cast<A>(dy[row + k]);
  total = block_reduce(total, shared, [](A a, A b) { return a + b; });
  for (int64_t k = threadIdx.x; k < c; k += blockDim.x)
    dx[row + k] = static_cast<T>(static_cast<A>(dy[row + k]) - ::exp(static_cast<A>(y[row + k])) * total);
}

void softmax_forward(Tensor& y, const Tensor& x) {
  visit_float(x.dtype(), [&]<class T>() {
    launch(softmax_forward_kernel<T>, rows_of(x), y.data<T>(), x.data<T>(), x.size(1));
  });
}

void log_softmax_forward(Tensor& y, const Tensor& x) {
  visit_float(x.dtype(), [&]<class T>() {
    launch(log_softmax_forward_kernel<T>, rows_of(x), y.data<T>(), x.data<T>(), x.size(1));
  });
}

void softmax_backward(Tensor& dx, const Tensor& dy, const Tensor& y) {
  visit_float(y.dtype(), [&]<class T>() {
    launch(softmax_backward_kernel<T>, rows_of(y), dx.data<T>(), dy.data<T>(), y.data<T>(), y.size(1));
  });
}

void log_softmax_backward(Tensor& dx, const Tensor& dy, const Tensor& y) {
  visit_float(y.dtype(), [&]<class T>() {
    launch(log_softmax_backward_kernel<T>, rows_of(y), dx.data<T>(), dy.data<T>(), y.data<T>(), y.size(1));
  });
}

}  // namespace krait::kernels::cuda

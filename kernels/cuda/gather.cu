#include "kernels/gather.h"

#include "core/cuda/launch.cuh"

namespace krait::kernels::cuda {

struct IndexView {
  const int64_t* data;
  int64_t so, sk, si;
  __device__ int64_t at(int64_t o, int64_t k, int64_t i) const { return data[o * so + k * sk + i * si]; }
};

static IndexView view_of(const Tensor& index) {
  return {index.data<int64_t>(), index.stride(0), index.stride(1), index.stride(2)};
}

template <class T>
__global__ void gather_forward_kernel(T* y, const T* x, IndexView index, int64_t o_size, int64_t r, int64_t k_size,
                                      int64_t n) {
  const int64_t total = o_size * k_size * n, stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t t = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; t < total; t += stride) {
    const int64_t i = t % n, k = t / n % k_size, o = t / n / k_size;
    const int64_t row = index.at(o, k, i);
    y[t] = row >= 0 && row < r ? x[(o * r + row) * n + i] : static_cast<T>(NAN);
  }
}

// A thread owns one (o, i) line and adds in the order of k: no atomics, the same sum every time. Loads of
// neighbouring threads are neighbours; long indices over few lines leave most of the GPU idle.
template <class T>
__global__ void gather_backward_kernel(accum_t<T>* dx, const T* dy, IndexView index, int64_t o_size, int64_t r,
                                       int64_t k_size, int64_t n) {
  const int64_t total = o_size * n, stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t t = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; t < total; t += stride) {
    const int64_t i = t % n, o = t / n;
    for (int64_t k = 0; k < k_size; ++k) {
      const int64_t row = index.at(o, k, i);
      if (row >= 0 && row < r) dx[(o * r + row) * n + i] += static_cast<accum_t<T>>(dy[(o * k_size + k) * n + i]);
    }
  }
}

void gather_forward(Tensor& y, const Tensor& x, const Tensor& index) {
  visit_float(x.dtype(), [&]<class T>() {
    launch(gather_forward_kernel<T>,
           {.grid = std::min<int64_t>(ceil_div(y.numel(), 256), 132 * 16), .stream = current_stream(x.device())},
           y.data<T>(), x.data<T>(), view_of(index), x.size(0), x.size(1), y.size(1), x.size(2));
  });
}

void gather_backward(Tensor& dx, const Tensor& dy, const Tensor& index) {
  visit_float(dy.dtype(), [&]<class T>() {
    launch(gather_backward_kernel<T>,
           {.grid = std::min<int64_t>(ceil_div(dx.size(0) * dx.size(2), 64), 132 * 16), .block = 64,
            .stream = current_stream(dy.device())},
           dx.data<accum_t<T>>(), dy.data<T>(), view_of(index), dx.size(0), dx.size(1), dy.size(1), dx.size(2));
  });
}

}  // namespace krait::kernels::cuda

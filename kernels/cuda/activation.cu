#include "core/cuda/launch.cuh"
#include "kernels/activation.h"
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/packed.cuh"

// Bound by memory: every kernel reads its inputs once and writes its outputs once, in 16-byte pieces where widths
// and addresses allow.
namespace krait::kernels::cuda {

namespace {

template <class T, class Fn, int V>
__global__ void activation_forward_kernel(T* __restrict__ y, const T* __restrict__ x, int64_t vectors) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= vectors) return;
  accum_t<T> v[V];
  load_values(v, x + i * V);
#pragma unroll
  for (int k = 0; k < V; ++k) v[k] = Fn::at(v[k]).value;
  store_values(y + i * V, v);
}

template <class T, class Fn, int V>
__global__ void activation_backward_kernel(T* __restrict__ dx, const T* __restrict__ dy, const T* __restrict__ x,
                                           int64_t vectors) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= vectors) return;
  accum_t<T> v[V], d[V];
  load_values(v, x + i * V);
  load_values(d, dy + i * V);
#pragma unroll
  for (int k = 0; k < V; ++k) d[k] *= Fn::at(v[k]).slope;
  store_values(dx + i * V, d);
}

// One thread per vector of a row; n = row length in vectors.
template <class T, class Fn, int V>
__global__ void glu_forward_kernel(T* __restrict__ y, const T* __restrict__ gate, const T* __restrict__ up,
                                   int64_t vectors, int64_t n, int64_t stride) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= vectors) return;
  const int64_t row = i / n, in = row * stride + (i - row * n) * V;
  accum_t<T> g[V], u[V];
  load_values(g, gate + in);
  load_values(u, up + in);
#pragma unroll
  for (int k = 0; k < V; ++k) g[k] = Fn::at(g[k]).value * u[k];
  store_values(y + i * V, g);
}

template <class T, class Fn, int V>
__global__ void glu_backward_kernel(T* __restrict__ dgate, T* __restrict__ dup, const T* __restrict__ dy,
                                    const T* __restrict__ gate, const T* __restrict__ up, int64_t vectors, int64_t n,
                                    int64_t stride, int64_t out_stride) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= vectors) return;
  const int64_t row = i / n, col = (i - row * n) * V, in = row * stride + col, out = row * out_stride + col;
  accum_t<T> g[V], u[V], d[V];
  load_values(g, gate + in);
  load_values(u, up + in);
  load_values(d, dy + i * V);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const auto at = Fn::at(g[k]);
    g[k] = d[k] * u[k] * at.slope;
    u[k] = d[k] * at.value;
  }
  store_values(dgate + out, g);
  store_values(dup + out, u);
}

// Calls body.operator()<T, Function, V>() with V values per 16 bytes, or 1 unless `wide` (given the V in question).
template <class F, class W>
void visit_all_of(DType dtype, Activation f, W wide, F&& body) {
  visit_float(dtype, [&]<class T>() {
    constexpr int V = 16 / sizeof(T);
    const bool vectors = wide.template operator()<T>(V);
    visit_activation(f, [&]<class Fn>() {
      if (vectors)
        body.template operator()<T, Fn, V>();
      else
        body.template operator()<T, Fn, 1>();
    });
  });
}

}  // namespace

void activation_forward(Tensor& y, const Tensor& x, Activation f) {
  const int64_t n = x.numel();
  const auto wide = [&]<class T>(int v) { return n % v == 0 && aligned16(y.data<T>(), x.data<T>()); };
  visit_all_of(x.dtype(), f, wide, [&]<class T, class Fn, int V>() {
    launch(activation_forward_kernel<T, Fn, V>,
           {.grid = ceil_div(n / V, 256), .block = 256, .stream = current_stream(x.device())}, y.data<T>(),
           x.data<T>(), n / V);
  });
}

void activation_backward(Tensor& dx, const Tensor& dy, const Tensor& x, Activation f) {
  const int64_t n = x.numel();
  const auto wide = [&]<class T>(int v) { return n % v == 0 && aligned16(dx.data<T>(), dy.data<T>(), x.data<T>()); };
  visit_all_of(x.dtype(), f, wide, [&]<class T, class Fn, int V>() {
    launch(activation_backward_kernel<T, Fn, V>,
           {.grid = ceil_div(n / V, 256), .block = 256, .stream = current_stream(x.device())}, dx.data<T>(),
           dy.data<T>(), x.data<T>(), n / V);
  });
}

void glu_forward(Tensor& y, const Tensor& gate, const Tensor& up, Activation f) {
  const int64_t r = y.size(0), n = y.size(1), stride = gate.stride(0);
  const auto wide = [&]<class T>(int v) {
    return n % v == 0 && stride % v == 0 && aligned16(y.data<T>(), gate.data<T>(), up.data<T>());
  };
  visit_all_of(y.dtype(), f, wide, [&]<class T, class Fn, int V>() {
    const int64_t vectors = r * (n / V);
    launch(glu_forward_kernel<T, Fn, V>,
           {.grid = ceil_div(vectors, 256), .block = 256, .stream = current_stream(y.device())}, y.data<T>(),
           gate.data<T>(), up.data<T>(), vectors, n / V, stride);
  });
}

void glu_backward(Tensor& dgate, Tensor& dup, const Tensor& dy, const Tensor& gate, const Tensor& up, Activation f) {
  const int64_t r = dy.size(0), n = dy.size(1), stride = gate.stride(0), out_stride = dgate.stride(0);
  const auto wide = [&]<class T>(int v) {
    return n % v == 0 && stride % v == 0 && out_stride % v == 0 &&
           aligned16(dgate.data<T>(), dup.data<T>(), dy.data<T>(), gate.data<T>(), up.data<T>());
  };
  visit_all_of(dy.dtype(), f, wide, [&]<class T, class Fn, int V>() {
    const int64_t vectors = r * (n / V);
    launch(glu_backward_kernel<T, Fn, V>,
           {.grid = ceil_div(vectors, 256), .block = 256, .stream = current_stream(dy.device())}, dgate.data<T>(),
           dup.data<T>(), dy.data<T>(), gate.data<T>(), up.data<T>(), vectors, n / V, stride, out_stride);
  });
}

}  // namespace krait::kernels::cuda

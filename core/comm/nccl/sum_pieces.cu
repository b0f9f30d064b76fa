#include "core/comm/nccl/sum_pieces.h"

#include <cuda_bf16.h>

#include <algorithm>

#include "core/cuda/launch.cuh"

namespace krait::comm {

namespace {

constexpr int kThreads = 256;

__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(float x) { return x; }
__device__ double widen(double x) { return x; }
__device__ void narrow(__nv_bfloat16& to, float x) { to = __float2bfloat16(x); }
__device__ void narrow(float& to, float x) { to = x; }
__device__ void narrow(double& to, double x) { to = x; }

template <class T, class A>
__global__ void __launch_bounds__(kThreads) sum_kernel(T* to, const T* pieces, int64_t n, int members) {
  constexpr int V = 16 / sizeof(T);
  struct alignas(16) Word {
    T value[V];
  };
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * V; i < n; i += int64_t{gridDim.x} * kThreads * V) {
    A sum[V] = {};
    for (int r = 0; r < members; ++r) {
      const Word in = *reinterpret_cast<const Word*>(pieces + r * n + i);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += widen(in.value[v]);
    }
    Word out;
#pragma unroll
    for (int v = 0; v < V; ++v) narrow(out.value[v], sum[v]);
    *reinterpret_cast<Word*>(to + i) = out;
  }
}

template <class T, class A>
void run(void* to, const void* pieces, int64_t n, int members, cudaStream_t stream) {
  const int64_t words = n * static_cast<int64_t>(sizeof(T)) / 16;
  launch(sum_kernel<T, A>, {.grid = std::min<int64_t>(ceil_div(words, kThreads), 1024), .block = kThreads, .stream = Stream{{}, stream}},
         static_cast<T*>(to), static_cast<const T*>(pieces), n, members);
}

}  // namespace

void sum_pieces(void* to, const void* pieces, int64_t n, int members, DType dtype, cudaStream_t stream) {
  if (dtype == DType::f64) return run<double, double>(to, pieces, n, members, stream);
  if (dtype == DType::f32) return run<float, float>(to, pieces, n, members, stream);
  KRAIT_ASSERT(dtype == DType::bf16, "sum_pieces adds no {}.", name_of(dtype));
  run<__nv_bfloat16, float>(to, pieces, n, members, stream);
}

}  // namespace krait::comm

#include "kernels/grad_norm.h"

#include "core/cuda/launch.cuh"

namespace krait::kernels::cuda {

namespace {

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

__device__ double square(double v) { return v * v; }

// The sum of all threads' values, in thread 0; the order is fixed. blockDim.x is a multiple of 32.
__device__ double block_sum(double s) {
  __shared__ double of_warp[32];
  for (int d = 16; d > 0; d /= 2) s += __shfl_down_sync(0xffffffffu, s, d);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x < 32) {
    s = threadIdx.x < blockDim.x / 32 ? of_warp[threadIdx.x] : 0.0;
    for (int d = 16; d > 0; d /= 2) s += __shfl_down_sync(0xffffffffu, s, d);
  }
  return s;
}

// One block per chunk. Bound by memory: n sizeof(T) bytes.
template <class T>
__global__ void __launch_bounds__(256) sum_squares_kernel(double* sums, const T* x, int64_t n) {
  const int64_t begin = int64_t{blockIdx.x} * kNormChunk;
  const int count = static_cast<int>(n - begin < kNormChunk ? n - begin : kNormChunk);
  const T* const p = x + begin;
  constexpr int kSize = Pack<T>::kSize;
  const int packed = reinterpret_cast<uintptr_t>(p) % 16 == 0 ? count / kSize : 0;
  double s = 0;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < packed; i += 256) {
    const Pack<T> v = reinterpret_cast<const Pack<T>*>(p)[i];
#pragma unroll
    for (int j = 0; j < kSize; ++j) s += square(static_cast<accum_t<T>>(v.at[j]));
  }
  for (int i = packed * kSize + static_cast<int>(threadIdx.x); i < count; i += 256)
    s += square(static_cast<accum_t<T>>(p[i]));
  s = block_sum(s);
  if (threadIdx.x == 0) sums[blockIdx.x] = s;
}

__global__ void __launch_bounds__(1024)
    norm_clip_kernel(double* values, const double* sums, int64_t n, double max_norm, int64_t* skipped) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) total += sums[i];
  total = block_sum(total);
  if (threadIdx.x != 0) return;
  const bool is_finite = isfinite(total);
  const double norm = sqrt(total);
  values[0] = norm;
  values[1] = !is_finite ? 0.0 : max_norm > 0 ? fmin(1.0, max_norm / (norm + 1e-6)) : 1.0;
  values[2] = is_finite ? 1.0 : 0.0;
  values[3] = total;
  if (skipped && !is_finite) ++*skipped;
}

}  // namespace

void sum_squares(Tensor& sums, const Tensor& x) {
  visit_float(x.dtype(), [&]<class T>() {
    launch(sum_squares_kernel<T>, {.grid = sums.numel(), .block = 256, .stream = current_stream(x.device())},
           sums.data<double>(), x.data<T>(), x.numel());
  });
}

void norm_clip(Tensor& values, const Tensor& sums, double max_norm, const Tensor& skipped) {
  launch(norm_clip_kernel, {.grid = 1, .block = 1024, .stream = current_stream(sums.device())}, values.data<double>(),
         sums.data<double>(), sums.numel(), max_norm, skipped.defined() ? skipped.data<int64_t>() : nullptr);
}

}  // namespace krait::kernels::cuda

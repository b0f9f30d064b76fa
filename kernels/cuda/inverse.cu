#include "kernels/inverse.h"

#include "core/cuda/launch.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 256;

// One block per matrix, in place in global memory: matrices of a few hundred rows stay in the caches.
__global__ void __launch_bounds__(kThreads) inverse_kernel(double* all, int32_t* all_swaps, int64_t n) {
  __shared__ double best[kThreads];
  __shared__ int64_t where[kThreads];
  double* a = all + int64_t{blockIdx.x} * n * n;
  int32_t* swaps = all_swaps + int64_t{blockIdx.x} * n;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  for (int64_t k = 0; k < n; ++k) {
    // the first row with the largest entry of column k
    double largest = -1;
    int64_t row = k;
    for (int64_t i = k + tid; i < n; i += kThreads) {
      const double size = fabs(a[i * n + k]);
      if (size > largest) {
        largest = size;
        row = i;
      }
    }
    best[tid] = largest;
    where[tid] = row;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (tid < half) {
        const bool other = best[tid + half] > best[tid] ||
                           (best[tid + half] == best[tid] && where[tid + half] < where[tid]);
        if (other) {
          best[tid] = best[tid + half];
          where[tid] = where[tid + half];
        }
      }
      __syncthreads();
    }
    const int64_t pivot = where[0];
    if (tid == 0) swaps[k] = static_cast<int32_t>(pivot);
    const double scale = 1.0 / a[pivot * n + k];
    __syncthreads();  // every thread has read the pivot before the rows move
    for (int64_t j = tid; j < n; j += kThreads) {
      const double up = a[k * n + j], down = a[pivot * n + j];
      a[pivot * n + j] = up;
      a[k * n + j] = (j == k ? 1.0 : down) * scale;
    }
    __syncthreads();
    // one warp per row; lane 0 of a row's warp holds its factor before column k is cleared
    for (int64_t i = warp; i < n; i += kThreads / 32) {
      if (i == k) continue;
      const double factor = a[i * n + k];
      __syncwarp();
      for (int64_t j = lane; j < n; j += 32) a[i * n + j] = (j == k ? 0.0 : a[i * n + j]) - factor * a[k * n + j];
      __syncwarp();
    }
    __syncthreads();
  }
  for (int64_t k = n - 1; k >= 0; --k) {  // row swaps of the matrix are column swaps of the inverse, in reverse
    const int64_t other = swaps[k];
    if (other == k) continue;
    for (int64_t i = tid; i < n; i += kThreads) {
      const double t = a[i * n + k];
      a[i * n + k] = a[i * n + other];
      a[i * n + other] = t;
    }
    // a thread keeps its rows in every swap: no barrier
  }
}

}  // namespace

void batched_inverse(Tensor& a, Tensor& swaps) {
  launch(inverse_kernel, {.grid = a.size(0), .block = kThreads, .stream = current_stream(a.device())},
         a.data<double>(), swaps.data<int32_t>(), a.size(1));
}

}  // namespace krait::kernels::cuda

#pragma once
#include "kernels/cuda/aligned.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/norm.h"

// RMSNorm and LayerNorm (kCentred) rows on the GPU; the two differ in the mean and the bias. X: dtype of x, y, dy;
// R: of the residual stream and of what was normalised; A: of sums, weights and statistics.
// A group of kThreads threads (one warp, or a block) holds a row in registers, kEach values per thread; other rows
// (odd widths, more than 8192 values, fp64) are re-read by a plain kernel.
namespace krait::kernels::cuda {

// Sums of N values over a group; every thread gets the same bits.
template <int kThreads, int N, class A>
__device__ __forceinline__ void group_sum(A (&v)[N]) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
#pragma unroll
    for (int n = 0; n < N; ++n) v[n] += __shfl_xor_sync(0xffffffffu, v[n], offset);
  if constexpr (kThreads > 32) {
    __shared__ A part[N][kThreads / 32];
    __syncthreads();  // the sums of an earlier call have been read
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int n = 0; n < N; ++n) part[n][threadIdx.x / 32] = v[n];
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n) {
      v[n] = part[n][0];
#pragma unroll
      for (int w = 1; w < kThreads / 32; ++w) v[n] += part[n][w];
    }
  }
}

inline constexpr int kWarpBlock = 128;  // threads of a block whose warps take a row each

constexpr int block_of(int group) { return group == 32 ? kWarpBlock : group; }
constexpr int groups_of(int group) { return group == 32 ? kWarpBlock / 32 : 1; }

// Bound by memory: r c (sizeof(X) + sizeof(X)) bytes, with a residual 2 sizeof(R) more.
template <bool kCentred, class X, class R, int kThreads, int kEach>
__global__ void __launch_bounds__(block_of(kThreads), (sizeof(X) == 2 ? 1024 : 512) / block_of(kThreads))
    norm_forward_kernel(X* __restrict__ y, R* __restrict__ sum, float* __restrict__ mean, float* __restrict__ rstd,
                        const X* __restrict__ x, const R* __restrict__ residual, const float* __restrict__ w,
                        const float* __restrict__ b, int64_t r, int c, float eps, float offset) {
  constexpr int V = 16 / sizeof(X), kVectors = kEach / V;
  const int lane = static_cast<int>(threadIdx.x) % kThreads;
  const int64_t row = int64_t{blockIdx.x} * groups_of(kThreads) + threadIdx.x / kThreads;
  take_over();
  if (row >= r) return;  // a whole group
  float v[kVectors][V];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int col = (k * kThreads + lane) * V;
    if (col < c) {
      load_values(v[k], x + row * c + col);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) v[k][i] = 0;
    }
  }
  if (residual != nullptr) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int col = (k * kThreads + lane) * V;
      if (col < c) {
        float other[V];
        load_values(other, residual + row * c + col);
#pragma unroll
        for (int i = 0; i < V; ++i) v[k][i] = static_cast<float>(static_cast<R>(v[k][i] + other[i]));
        store_values(sum + row * c + col, v[k]);
      }
    }
  }
  float mu = 0, squares = 0;
  if constexpr (kCentred) {
    float first[1] = {0};
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
#pragma unroll
      for (int i = 0; i < V; ++i) first[0] += v[k][i];
    group_sum<kThreads>(first);
    first[0] /= static_cast<float>(c);
    // The first mean carries a rounding error of the size of the values; deviations from it correct it.
    float s[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
      if ((k * kThreads + lane) * V < c)
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float d = v[k][i] - first[0];
          s[0] += d;
          s[1] += d * d;
        }
    group_sum<kThreads>(s);
    const float shift = s[0] / static_cast<float>(c);
    mu = first[0] + shift;
    squares = fmaxf(s[1] / static_cast<float>(c) - shift * shift, 0.0f);
  } else {
    float s[1] = {0};
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
#pragma unroll
      for (int i = 0; i < V; ++i) s[0] += v[k][i] * v[k][i];
    group_sum<kThreads>(s);
    squares = s[0] / static_cast<float>(c);
  }
  const float scale = 1.0f / sqrtf(squares + eps);
  if (lane == 0) {
    if constexpr (kCentred) mean[row] = mu;
    rstd[row] = scale;
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int col = (k * kThreads + lane) * V;
    if (col >= c) continue;
    float weight[V], bias[V] = {};
    load_values(weight, w + col);
    if (kCentred && b != nullptr) load_values(bias, b + col);
#pragma unroll
    for (int i = 0; i < V; ++i) v[k][i] = (v[k][i] - mu) * scale * (weight[i] + offset) + bias[i];
    store_values(y + row * c + col, v[k]);
  }
}

// Any width and dtype: one block per row, which reads it three times (from cache).
template <bool kCentred, class X, class R, class A = accum_t<X>>
__global__ void norm_forward_plain_kernel(X* y, R* sum, A* mean, A* rstd, const X* x, const R* residual, const A* w,
                                          const A* b, int64_t c, A eps, A offset) {
  const int64_t row = blockIdx.x;
  x += row * c;
  y += row * c;
  if (residual != nullptr) {
    residual += row * c;
    sum += row * c;
  }
  const auto at = [&](int64_t j) {
    return residual == nullptr ? static_cast<A>(x[j])
                               : static_cast<A>(static_cast<R>(static_cast<A>(x[j]) + static_cast<A>(residual[j])));
  };
  A first[1] = {0}, s[2] = {0, 0};
  if constexpr (kCentred) {
    for (int64_t j = threadIdx.x; j < c; j += blockDim.x) first[0] += at(j);
    group_sum<256>(first);
    first[0] /= static_cast<A>(c);
  }
  for (int64_t j = threadIdx.x; j < c; j += blockDim.x) {
    const A d = at(j) - first[0];
    s[0] += d;
    s[1] += d * d;
  }
  group_sum<256>(s);
  const A shift = kCentred ? s[0] / static_cast<A>(c) : A(0), mu = first[0] + shift;
  const A square = s[1] / static_cast<A>(c) - shift * shift;
  const A scale = A(1) / sqrt((square > A(0) ? square : A(0)) + eps);
  if (threadIdx.x == 0) {
    if constexpr (kCentred) mean[row] = mu;
    rstd[row] = scale;
  }
  for (int64_t j = threadIdx.x; j < c; j += blockDim.x) {
    const A v = at(j);
    if (residual != nullptr) sum[j] = static_cast<R>(v);
    y[j] = static_cast<X>((v - mu) * scale * (w[j] + offset) + (b != nullptr ? b[j] : A(0)));
  }
}

template <bool kCentred>
void norm_forward(Tensor& y_out, Tensor& sum_out, Tensor& mean_out, Tensor& rstd_out, const Tensor& x_in,
                  const Tensor& residual_in, const Tensor& w_in, const Tensor& b_in, double eps,
                  double weight_offset = 0) {
  const int64_t c = x_in.size(-1), r = x_in.numel() / c;
  const Stream stream = current_stream(x_in.device());
  visit_norm(x_in.dtype(), residual_in.defined() ? residual_in.dtype() : x_in.dtype(), [&]<class X, class R>() {
    using A = accum_t<X>;
    X* y = y_out.data<X>();
    R *sum = pointer_or_null<R>(sum_out), *residual = pointer_or_null<R>(residual_in);
    A *mean = pointer_or_null<A>(mean_out), *rstd = rstd_out.data<A>(), *w = w_in.data<A>(), *b = pointer_or_null<A>(b_in);
    const X* x = x_in.data<X>();
    const auto offset = static_cast<A>(weight_offset);
    if constexpr (!std::is_same_v<X, double>) {
      if (c <= 8192 && c % (16 / static_cast<int64_t>(sizeof(X))) == 0 && aligned16(y, sum, x, residual, w, b)) {
        const auto run = [&]<int kThreads>() {
          const LaunchConfig config{.grid = ceil_div(r, groups_of(kThreads)), .block = block_of(kThreads), .stream = stream};
          const auto kernel = norm_forward_kernel<kCentred, X, R, kThreads, 32>;
          // A few rows are a step of a decoding loop, where every kernel is shorter than its launch.
          if (r <= 256)
            launch_overlapped(kernel, config, y, sum, mean, rstd, x, residual, w, b, r, c, eps, offset);
          else
            launch(kernel, config, y, sum, mean, rstd, x, residual, w, b, r, c, eps, offset);
        };
        if (c <= 1024) return run.template operator()<32>();
        if (c <= 4096) return run.template operator()<128>();
        return run.template operator()<256>();
      }
    }
    launch(norm_forward_plain_kernel<kCentred, X, R>, {.grid = r, .block = 256, .stream = stream}, y, sum, mean, rstd,
           x, residual, w, b, c, eps, offset);
  });
}

}  // namespace krait::kernels::cuda

#include "kernels/head_norm.h"

#include "kernels/cuda/norm_backward.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kWarps = 4;  // per block; a warp takes one head of a row

// Values of a head that a lane keeps in registers; longer heads are read again from cache.
constexpr int kKeep = 16;

template <class A>
struct Statistics {
  A mean, rstd;
};

template <class X, class A = accum_t<X>>
__device__ Statistics<A> statistics(const X* x, int lane, int p, A eps) {
  A first[1] = {0}, s[2] = {0, 0};
  for (int j = lane; j < p; j += 32) first[0] += static_cast<A>(x[j]);
  group_sum<32>(first);
  first[0] /= static_cast<A>(p);
  for (int j = lane; j < p; j += 32) {
    const A d = static_cast<A>(x[j]) - first[0];
    s[0] += d;
    s[1] += d * d;
  }
  group_sum<32>(s);
  const A shift = s[0] / static_cast<A>(p), square = s[1] / static_cast<A>(p) - shift * shift;
  return {first[0] + shift, A(1) / sqrt((square > A(0) ? square : A(0)) + eps)};
}

// Bound by memory: 2 r c sizeof(X) bytes; the second and third reads of x hit the first-level cache.
template <class X, class A = accum_t<X>>
__global__ void __launch_bounds__(32 * kWarps)
    head_norm_forward_kernel(X* __restrict__ y, A* __restrict__ mean, A* __restrict__ rstd, const X* __restrict__ x,
                             const A* __restrict__ w, int64_t n, int h, int p, A eps) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (i >= n) return;
  x += i * p;
  y += i * p;
  w += i % h * p;
  const Statistics<A> s = statistics(x, lane, p, eps);
  if (lane == 0) {
    mean[i] = s.mean;
    rstd[i] = s.rstd;
  }
  for (int j = lane; j < p; j += 32) y[j] = static_cast<X>((static_cast<A>(x[j]) - s.mean) * s.rstd * w[j]);
}

// Grid (chunks of rows, heads over warps). A warp walks down its head's rows; dw of the chunk goes to partial
// (chunks, h p), from registers for the first 32 kKeep channels, the rest summed in place (a lane owns its columns).
template <class X, class A = accum_t<X>>
__global__ void __launch_bounds__(32 * kWarps)
    head_norm_backward_kernel(X* __restrict__ dx, A* __restrict__ partial, const X* __restrict__ dy,
                              const X* __restrict__ x, const A* __restrict__ w, const A* __restrict__ mean,
                              const A* __restrict__ rstd, int64_t r, int h, int p) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int head = static_cast<int>(blockIdx.y) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (head >= h) return;
  const int64_t c = int64_t{h} * p;
  A* dw = partial + blockIdx.x * c + int64_t{head} * p;
  w += int64_t{head} * p;
  A kept[kKeep] = {};
  for (int j = 32 * kKeep + lane; j < p; j += 32) dw[j] = 0;
  for (int64_t row = blockIdx.x; row < r; row += gridDim.x) {
    const int64_t i = row * h + head, at = i * p;
    const A mu = mean[i], scale = rstd[i];
    A s[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < kKeep; ++k) {
      const int j = 32 * k + lane;
      if (j >= p) continue;
      const A up = static_cast<A>(dy[at + j]), xhat = (static_cast<A>(x[at + j]) - mu) * scale, g = up * w[j];
      kept[k] += up * xhat;
      s[0] += g;
      s[1] += g * xhat;
    }
    for (int j = 32 * kKeep + lane; j < p; j += 32) {
      const A up = static_cast<A>(dy[at + j]), xhat = (static_cast<A>(x[at + j]) - mu) * scale, g = up * w[j];
      dw[j] += up * xhat;
      s[0] += g;
      s[1] += g * xhat;
    }
    group_sum<32>(s);
    const A mean_g = s[0] / static_cast<A>(p), mean_gx = s[1] / static_cast<A>(p);
    for (int j = lane; j < p; j += 32) {
      const A xhat = (static_cast<A>(x[at + j]) - mu) * scale;
      A g = static_cast<A>(dy[at + j]) * w[j];  // rounded, so that g - mean_g is 0 for a single channel
      if constexpr (std::is_same_v<A, float>) g = __fmul_rn(static_cast<A>(dy[at + j]), w[j]);
      if constexpr (std::is_same_v<A, double>) g = __dmul_rn(static_cast<A>(dy[at + j]), w[j]);
      dx[at + j] = static_cast<X>(scale * (g - mean_g - xhat * mean_gx));
    }
  }
#pragma unroll
  for (int k = 0; k < kKeep; ++k)
    if (32 * k + lane < p) dw[32 * k + lane] = kept[k];
}

}  // namespace

void head_norm_forward(Tensor& y, Tensor& mean, Tensor& rstd, const Tensor& x, const Tensor& w, double eps) {
  const int64_t p = x.size(-1), h = x.size(-2), n = x.numel() / p;
  visit_float(x.dtype(), [&]<class X>() {
    using A = accum_t<X>;
    launch(head_norm_forward_kernel<X>,
           {.grid = ceil_div(n, kWarps), .block = 32 * kWarps, .stream = current_stream(x.device())}, y.data<X>(),
           mean.data<A>(), rstd.data<A>(), x.data<X>(), w.data<A>(), n, h, p, eps);
  });
}

void head_norm_backward(Tensor& dx, Tensor& dw, bool add_dw, const Tensor& dy, const Tensor& x, const Tensor& w,
                        const Tensor& mean, const Tensor& rstd) {
  const int64_t p = x.size(-1), h = x.size(-2), c = h * p, r = x.numel() / c;
  // A number that depends on the shape alone, so that every GPU gives the same bits.
  const int64_t heads = ceil_div(h, kWarps), chunks = std::min<int64_t>(r, std::max<int64_t>(1, 1056 / heads));
  const Stream stream = current_stream(x.device());
  visit_float(x.dtype(), [&]<class X>() {
    using A = accum_t<X>;
    const Tensor partial = empty({chunks, c}, dtype_of<A>, x.device());
    launch(head_norm_backward_kernel<X>, {.grid = chunks, .grid_y = heads, .block = 32 * kWarps, .stream = stream},
           dx.data<X>(), partial.data<A>(), dy.data<X>(), x.data<X>(), w.data<A>(), mean.data<A>(), rstd.data<A>(), r,
           h, p);
    launch(sum_partials_kernel<A>, {.grid = ceil_div(c, 32), .block = 512, .stream = stream}, dw.data<A>(), add_dw,
           static_cast<A*>(nullptr), false, partial.data<A>(), static_cast<const A*>(nullptr), chunks, c);
  });
}

}  // namespace krait::kernels::cuda

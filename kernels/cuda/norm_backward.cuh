#pragma once
#include "kernels/cuda/multiprocessors.h"
#include "kernels/cuda/norm.cuh"

// dx in one pass over the rows; dw and db in two: each block keeps the sums of its rows (in registers where the row
// fits) and writes them to a partial (blocks, c), a second kernel adds the blocks in order. The number of blocks
// depends on the shape alone, so equal inputs give equal bits.
namespace krait::kernels::cuda {

// Threads of a block, and blocks on a multiprocessor, with the registers each variant needs. Warps that take a row each
// share one block, so that few partial sums are written.
constexpr int backward_block(int group, int each) { return group == 32 ? (each <= 24 ? 512 : 256) : group; }
constexpr int backward_blocks(int group) { return group == 32 ? 1 : 512 / group; }
constexpr int backward_groups(int group, int each) { return backward_block(group, each) / group; }

// Bound by memory: r c (2 sizeof(X) + sizeof(R) (+ those of dr in and out)) bytes.
template <bool kCentred, class X, class R, int kThreads, int kEach>
__global__ void __launch_bounds__(backward_block(kThreads, kEach), backward_blocks(kThreads))
    norm_backward_kernel(R* __restrict__ dr, X* __restrict__ dx, float* __restrict__ partial_w,
                         float* __restrict__ partial_b, const X* __restrict__ dy, const R* __restrict__ dr_in,
                         const R* __restrict__ x, const float* __restrict__ w, const float* __restrict__ mean,
                         const float* __restrict__ rstd, int64_t r, int c, float offset) {
  constexpr int V = 16 / sizeof(X), kVectors = kEach / V, kGroups = backward_groups(kThreads, kEach);
  const int lane = static_cast<int>(threadIdx.x) % kThreads, group = static_cast<int>(threadIdx.x) / kThreads;
  float dw[kVectors][V] = {}, db[kCentred ? kVectors : 1][V] = {};
  for (int64_t row = int64_t{blockIdx.x} * kGroups + group; row < r; row += int64_t{gridDim.x} * kGroups) {
    Packed<R, V> xs[kVectors], adds[kVectors];
    Packed<X, V> ups[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int col = (k * kThreads + lane) * V;
      if (col < c) {
        xs[k].load(x + row * c + col);
        ups[k].load(dy + row * c + col);
        if (dr_in != nullptr) adds[k].load(dr_in + row * c + col);
      }
    }
    const float mu = kCentred ? mean[row] : 0.0f, scale = rstd[row];
    float s[kCentred ? 2 : 1] = {};  // sums of g xhat, g
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int col = (k * kThreads + lane) * V;
      if (col >= c) continue;
      float xv[V], up[V], weight[V];
      xs[k].unpack(xv);
      ups[k].unpack(up);
      load_values(weight, w + col);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float xhat = (xv[i] - mu) * scale, g = up[i] * (weight[i] + offset);
        dw[k][i] += up[i] * xhat;
        if constexpr (kCentred) {
          db[k][i] += up[i];
          s[1] += g;
        }
        s[0] += g * xhat;
      }
    }
    group_sum<kThreads>(s);
    const float mean_gx = s[0] / static_cast<float>(c), mean_g = kCentred ? s[kCentred] / static_cast<float>(c) : 0.0f;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int col = (k * kThreads + lane) * V;
      if (col >= c) continue;
      float xv[V], up[V], weight[V], d[V] = {};
      xs[k].unpack(xv);
      ups[k].unpack(up);
      load_values(weight, w + col);
      if (dr_in != nullptr) adds[k].unpack(d);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float xhat = (xv[i] - mu) * scale, g = up[i] * (weight[i] + offset);
        d[i] += scale * (g - mean_g - xhat * mean_gx);
      }
      store_values(dr + row * c + col, d);
      if (dx != nullptr) store_values(dx + row * c + col, d);
    }
  }
  let_next_begin();
  if constexpr (kGroups > 1) {  // the warps of the block, in order
    extern __shared__ __align__(16) float of_groups[];  // [kGroups][c]
    const auto join = [&](float* partial, const float(&own)[kVectors][V]) {
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kVectors; ++k) {
        const int col = (k * kThreads + lane) * V;
        if (col < c) store_values(of_groups + group * c + col, own[k]);
      }
      __syncthreads();
      for (int col = static_cast<int>(threadIdx.x); col < c; col += static_cast<int>(blockDim.x)) {
        float sum = of_groups[col];
#pragma unroll
        for (int g = 1; g < kGroups; ++g) sum += of_groups[g * c + col];
        partial[int64_t{blockIdx.x} * c + col] = sum;
      }
    };
    join(partial_w, dw);
    if constexpr (kCentred)
      if (partial_b != nullptr) join(partial_b, db);
  } else {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int col = (k * kThreads + lane) * V;
      if (col >= c) continue;
      store_values(partial_w + int64_t{blockIdx.x} * c + col, dw[k]);
      if constexpr (kCentred)
        if (partial_b != nullptr) store_values(partial_b + int64_t{blockIdx.x} * c + col, db[k]);
    }
  }
}

// Any width and dtype: 256 threads per row, sums in the block's row of the partials.
template <bool kCentred, class X, class R, class A = accum_t<X>>
__global__ void norm_backward_plain_kernel(R* dr, X* dx, A* partial_w, A* partial_b, const X* dy, const R* dr_in,
                                           const R* x, const A* w, const A* mean, const A* rstd, int64_t r, int64_t c,
                                           A offset) {
  A* dw = partial_w + int64_t{blockIdx.x} * c;
  A* db = partial_b != nullptr ? partial_b + int64_t{blockIdx.x} * c : nullptr;
  // A thread adds to its own columns alone.
  for (int64_t j = threadIdx.x; j < c; j += blockDim.x) {
    dw[j] = 0;
    if (db != nullptr) db[j] = 0;
  }
  for (int64_t row = blockIdx.x; row < r; row += gridDim.x) {
    const int64_t at = row * c;
    const A mu = kCentred ? mean[row] : A(0), scale = rstd[row];
    A s[2] = {0, 0};
    for (int64_t j = threadIdx.x; j < c; j += blockDim.x) {
      const A up = static_cast<A>(dy[at + j]), xhat = (static_cast<A>(x[at + j]) - mu) * scale, g = up * (w[j] + offset);
      dw[j] += up * xhat;
      if (db != nullptr) db[j] += up;
      s[0] += g;
      s[1] += g * xhat;
    }
    group_sum<256>(s);
    const A mean_g = kCentred ? s[0] / static_cast<A>(c) : A(0), mean_gx = s[1] / static_cast<A>(c);
    for (int64_t j = threadIdx.x; j < c; j += blockDim.x) {
      const A xhat = (static_cast<A>(x[at + j]) - mu) * scale;
      A g = static_cast<A>(dy[at + j]) * (w[j] + offset);  // rounded, so that g - mean_g is 0 for a single column
      if constexpr (std::is_same_v<A, float>) g = __fmul_rn(static_cast<A>(dy[at + j]), w[j] + offset);
      const A d = scale * (g - mean_g - xhat * mean_gx) + (dr_in != nullptr ? static_cast<A>(dr_in[at + j]) : A(0));
      dr[at + j] = static_cast<R>(d);
      if (dx != nullptr) dx[at + j] = static_cast<X>(d);
    }
  }
}

// dst = or += the sum over blocks of partial (blocks, c), in a fixed order. Block (32, 16) for 32 columns; blockIdx.y
// chooses dw or db.
template <class A>
__global__ void sum_partials_kernel(A* dw, bool add_dw, A* db, bool add_db, const A* partial_w, const A* partial_b,
                                    int64_t blocks, int64_t c) {
  __shared__ A part[16][33];
  take_over();
  A* dst = blockIdx.y == 0 ? dw : db;
  const A* partial = blockIdx.y == 0 ? partial_w : partial_b;
  const int tx = static_cast<int>(threadIdx.x) % 32, ty = static_cast<int>(threadIdx.x) / 32;
  const int64_t col = int64_t{blockIdx.x} * 32 + tx;
  A s = 0;
  if (col < c)
    for (int64_t k = ty; k < blocks; k += 16) s += partial[k * c + col];
  part[ty][tx] = s;
  __syncthreads();
  if (ty != 0 || col >= c) return;
  for (int k = 1; k < 16; ++k) s += part[k][tx];
  const bool add = blockIdx.y == 0 ? add_dw : add_db;
  dst[col] = add ? dst[col] + s : s;
}

template <bool kCentred>
void norm_backward(Tensor& dr_out, Tensor& dx_out, Tensor& dw_out, bool add_dw, Tensor& db_out, bool add_db,
                   const Tensor& dy_in, const Tensor& dr_in, const Tensor& x_in, const Tensor& w_in,
                   const Tensor& mean_in, const Tensor& rstd_in, double weight_offset = 0) {
  const int64_t c = x_in.size(-1), r = x_in.numel() / c;
  const Stream stream = current_stream(x_in.device());
  visit_norm(dy_in.dtype(), x_in.dtype(), [&]<class X, class R>() {
    using A = accum_t<X>;
    R *dr = dr_out.data<R>(), *add = pointer_or_null<R>(dr_in);
    X* dx = pointer_or_null<X>(dx_out);
    const X* dy = dy_in.data<X>();
    const R* x = x_in.data<R>();
    A *w = w_in.data<A>(), *mean = pointer_or_null<A>(mean_in), *rstd = rstd_in.data<A>();
    const auto run = [&](auto kernel, int64_t blocks, int threads, int64_t shared) {
      const Tensor partial_w = empty({blocks, c}, dtype_of<A>, x_in.device());
      const Tensor partial_b = db_out.defined() ? empty({blocks, c}, dtype_of<A>, x_in.device()) : Tensor();
      launch(kernel, {.grid = blocks, .block = threads, .shared = shared, .stream = stream}, dr, dx, partial_w.data<A>(),
             pointer_or_null<A>(partial_b), dy, add, x, w, mean, rstd, r, c, static_cast<A>(weight_offset));
      launch_overlapped(
             sum_partials_kernel<A>,
             {.grid = ceil_div(c, 32), .grid_y = db_out.defined() ? 2 : 1, .block = 512, .stream = stream},
             dw_out.data<A>(), add_dw, pointer_or_null<A>(db_out), add_db, partial_w.data<A>(),
             pointer_or_null<A>(partial_b), blocks, c);
    };
    if constexpr (!std::is_same_v<X, double>) {
      if (c <= 8192 && c % (16 / static_cast<int64_t>(sizeof(X))) == 0 && aligned16(dr, dx, dy, add, x, w)) {
        const auto fast = [&]<int kThreads, int kEach>() {
          constexpr int kGroups = backward_groups(kThreads, kEach);
          run(norm_backward_kernel<kCentred, X, R, kThreads, kEach>,
              std::min<int64_t>(ceil_div(r, kGroups), kMultiprocessors * backward_blocks(kThreads)),
              backward_block(kThreads, kEach),
              kGroups > 1 ? kGroups * c * static_cast<int64_t>(sizeof(float)) : 0);
        };
        if (c <= 768) return fast.template operator()<32, 24>();
        if (c <= 1024) return fast.template operator()<32, 32>();
        if (c <= 4096) return fast.template operator()<256, 16>();
        return fast.template operator()<512, 16>();
      }
    }
    run(norm_backward_plain_kernel<kCentred, X, R>, std::min<int64_t>(r, 2 * kMultiprocessors), 256, 0);
  });
}

}  // namespace krait::kernels::cuda

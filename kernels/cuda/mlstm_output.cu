// The norm of each head behind the cell of an mLSTM block, with its skip connection and gate.
#include "kernels/cuda/mlstm_block.cuh"
#include "kernels/cuda/norm_backward.cuh"
#include "kernels/mlstm_block.h"

namespace krait::kernels::cuda {

namespace {

constexpr int kWarps = 4, kFour = 4;  // a warp takes one head of a row; a lane 4 channels of every 128

template <class A>
__device__ __forceinline__ A sigmoid_of(A x) {
  return A(1) / (A(1) + exp(-x));
}
__device__ __forceinline__ float sigmoid_of(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// What a warp reads of one head of a row.
template <class T, class H, int kSteps>
struct HeadRow {
  Side<H, 4> h[kSteps];
  Side<T, 4> x[kSteps], gate[kSteps], up[kSteps];

  template <bool kBackward>
  __device__ __forceinline__ void load(int lane, int p, const H* from_h, const T* from_x, const T* from_gate, const T* from_up) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int j = (k * 32 + lane) * kFour;
      if (j >= p) continue;
      h[k] = load_four(from_h + j);
      x[k] = load_four(from_x + j);
      gate[k] = load_four(from_gate + j);
      if constexpr (kBackward) up[k] = load_four(from_up + j);
    }
  }
};

// Bound by memory: r c sizeof(H) + 3 r c sizeof(T) bytes.
template <class T, class H, int kSteps>
__global__ void __launch_bounds__(32 * kWarps)
    output_forward_kernel(T* __restrict__ y, accum_t<T>* __restrict__ mean, accum_t<T>* __restrict__ rstd,
                          const H* __restrict__ h, const accum_t<T>* __restrict__ w, const T* __restrict__ skip,
                          const T* __restrict__ x_c, const T* __restrict__ z, int64_t z_stride, int64_t n, int heads, int p,
                          accum_t<T> eps) {
  using A = accum_t<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (i >= n) return;
  const int64_t r = i / heads, c0 = i % heads * p, at = i * p;
  HeadRow<T, H, kSteps> in;
  in.template load<false>(lane, p, h + at, x_c + at, z + r * z_stride + c0, nullptr);
  A v[kSteps][4], first[1] = {A(0)}, s[2] = {A(0), A(0)};
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    if ((k * 32 + lane) * kFour >= p) continue;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      v[k][q] = static_cast<A>(in.h[k].at[q]);
      first[0] += v[k][q];
    }
  }
  group_sum<32>(first);
  first[0] /= static_cast<A>(p);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    if ((k * 32 + lane) * kFour >= p) continue;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const A d = v[k][q] - first[0];
      s[0] += d;
      s[1] += d * d;
    }
  }
  group_sum<32>(s);
  const A shift = s[0] / static_cast<A>(p), square = s[1] / static_cast<A>(p) - shift * shift, mu = first[0] + shift;
  const A scale = A(1) / sqrt((square > A(0) ? square : A(0)) + eps);
  if (lane == 0) {
    mean[i] = mu;
    rstd[i] = scale;
  }
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int j = (k * 32 + lane) * kFour;
    if (j >= p) continue;
    const Side<A, 4> weight = load_four(w + c0 + j);
    const Side<T, 4> by = load_four(skip + c0 + j);
    A out[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const A zv = static_cast<A>(in.gate[k].at[q]);
      const A u = (v[k][q] - mu) * scale * weight.at[q] + static_cast<A>(by.at[q]) * static_cast<A>(in.x[k].at[q]);
      out[q] = u * zv * sigmoid_of(zv);
    }
    store_four(y + at + j, out);
  }
}

// Grid (chunks of rows, heads over warps). A warp walks down its head's rows with the sums of dw and dskip in registers
// and the next row on its way: partial (2, chunks, heads p). Bound by memory: r c sizeof(H) + 6 r c sizeof(T) bytes.
template <class T, class H, int kSteps>
__global__ void __launch_bounds__(32 * kWarps, kSteps <= 3 && sizeof(T) == 2 ? 3 : 1)
    output_backward_kernel(T* __restrict__ dh, accum_t<T>* __restrict__ dots, T* __restrict__ dx_c, T* __restrict__ dz,
                           int64_t dz_stride, accum_t<T>* __restrict__ partial, const T* __restrict__ dy,
                           const H* __restrict__ h, const accum_t<T>* __restrict__ w, const T* __restrict__ skip,
                           const T* __restrict__ x_c, const T* __restrict__ z, int64_t z_stride,
                           const accum_t<T>* __restrict__ mean, const accum_t<T>* __restrict__ rstd, int64_t rows, int heads,
                           int p, accum_t<T> eps) {
  using A = accum_t<T>;
  constexpr bool kAhead = kSteps <= 4;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int head = static_cast<int>(blockIdx.y) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (head >= heads) return;
  const int64_t c = int64_t{heads} * p, c0 = int64_t{head} * p;
  Side<A, 4> weight[kSteps], dw[kSteps] = {}, dskip[kSteps] = {};
  Side<T, 4> by[kSteps];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int j = (k * 32 + lane) * kFour;
    if (j >= p) continue;
    weight[k] = load_four(w + c0 + j);
    by[k] = load_four(skip + c0 + j);
  }
  HeadRow<T, H, kSteps> next;
  A next_mean = A(0), next_rstd = A(0);
  const auto load = [&](int64_t r) {
    const int64_t at = (r * heads + head) * p;
    next.template load<true>(lane, p, h + at, x_c + at, z + r * z_stride + c0, dy + at);
    next_mean = mean[r * heads + head];
    next_rstd = rstd[r * heads + head];
  };
  if (kAhead) load(blockIdx.x);
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const int64_t i = r * heads + head, at = i * p;
    if (!kAhead) load(r);
    const HeadRow<T, H, kSteps> in = next;
    const A mu = next_mean, scale = next_rstd;
    if (kAhead && r + gridDim.x < rows) load(r + gridDim.x);
    A xhat[kSteps][4], g[kSteps][4], s[2] = {A(0), A(0)};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int j = (k * 32 + lane) * kFour;
      if (j >= p) continue;
      A dx_out[4], dz_out[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const A zv = static_cast<A>(in.gate[k].at[q]), d = static_cast<A>(in.up[k].at[q]), xv = static_cast<A>(in.x[k].at[q]);
        const A b = static_cast<A>(by[k].at[q]), sigmoid = sigmoid_of(zv);
        xhat[k][q] = (static_cast<A>(in.h[k].at[q]) - mu) * scale;
        const A u = xhat[k][q] * weight[k].at[q] + b * xv, ds = d * sigmoid, du = ds * zv;
        dz_out[q] = ds * u * (A(1) + zv * (A(1) - sigmoid));
        dx_out[q] = du * b;
        dskip[k].at[q] += du * xv;
        dw[k].at[q] += du * xhat[k][q];
        g[k][q] = du * weight[k].at[q];
        s[0] += g[k][q];
        s[1] += g[k][q] * xhat[k][q];
      }
      store_four(dz + r * dz_stride + c0 + j, dz_out);
      store_four(dx_c + at + j, dx_out);
    }
    group_sum<32>(s);
    const A mean_g = s[0] / static_cast<A>(p), mean_gx = s[1] / static_cast<A>(p);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int j = (k * 32 + lane) * kFour;
      if (j >= p) continue;
      A out[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) out[q] = scale * (g[k][q] - mean_g - xhat[k][q] * mean_gx);
      store_four(dh + at + j, out);
    }
    if (lane == 0) dots[i] = s[1] * eps * scale * scale;
  }
  A* to = partial + blockIdx.x * c + c0;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int j = (k * 32 + lane) * kFour;
    if (j >= p) continue;
    *reinterpret_cast<Side<A, 4>*>(to + j) = dw[k];
    *reinterpret_cast<Side<A, 4>*>(to + int64_t{gridDim.x} * c + j) = dskip[k];
  }
}

// f<steps>(): a lane's groups of 4 channels of a head of p <= 1024.
template <class F>
void with_steps(int64_t p, F&& f) {
  if (p <= 128) return f.template operator()<1>();
  if (p <= 256) return f.template operator()<2>();
  if (p <= 384) return f.template operator()<3>();
  if (p <= 512) return f.template operator()<4>();
  f.template operator()<8>();
}

// f<T, H>(): of x_c and of h, which is bf16 only beside bf16.
template <class F>
void visit_output(const Tensor& x_c, const Tensor& h, F&& f) {
  visit_float(x_c.dtype(), [&]<class T>() {
    if constexpr (std::is_same_v<T, bf16>)
      if (h.dtype() == DType::bf16) return f.template operator()<T, bf16>();
    f.template operator()<T, accum_t<T>>();
  });
}

}  // namespace

void mlstm_output_forward(MlstmOutput& out, const Tensor& h, const Tensor& w, const Tensor& skip, const Tensor& x_c,
                          const Tensor& z, double eps) {
  const int64_t p = h.size(-1), heads = h.size(-2), n = h.numel() / p;
  visit_output(x_c, h, [&]<class T, class H>() {
    using A = accum_t<T>;
    with_steps(p, [&]<int kSteps>() {
      launch(output_forward_kernel<T, H, kSteps>,
             {.grid = ceil_div(n, kWarps), .block = 32 * kWarps, .stream = current_stream(h.device())}, out.y.data<T>(),
             out.mean.data<A>(), out.rstd.data<A>(), h.data<H>(), w.data<A>(), skip.data<T>(), x_c.data<T>(), z.data<T>(),
             z.stride(0), n, heads, p, eps);
    });
  });
}

void mlstm_output_backward(MlstmOutputGrad& grad, bool add_dw, bool add_dskip, const Tensor& dy, const Tensor& h,
                           const Tensor& w, const Tensor& skip, const Tensor& x_c, const Tensor& z, const Tensor& mean,
                           const Tensor& rstd, double eps) {
  const int64_t p = h.size(-1), heads = h.size(-2), c = heads * p, rows = x_c.size(0), groups = ceil_div(heads, kWarps);
  // A number that depends on the shape alone, so that every GPU gives the same bits: three blocks of a multiprocessor.
  const int64_t chunks = std::min<int64_t>(rows, std::max<int64_t>(1, 396 / groups));
  const Stream stream = current_stream(h.device());
  visit_output(x_c, h, [&]<class T, class H>() {
    using A = accum_t<T>;
    const Tensor partial = empty({2, chunks, c}, dtype_of<A>, h.device());
    with_steps(p, [&]<int kSteps>() {
      launch(output_backward_kernel<T, H, kSteps>, {.grid = chunks, .grid_y = groups, .block = 32 * kWarps, .stream = stream},
             grad.dh.data<T>(), grad.dots.data<A>(), grad.dx_c.data<T>(), grad.dz.data<T>(), grad.dz.stride(0),
             partial.data<A>(), dy.data<T>(), h.data<H>(), w.data<A>(), skip.data<T>(), x_c.data<T>(), z.data<T>(),
             z.stride(0), mean.data<A>(), rstd.data<A>(), rows, heads, p, eps);
    });
    launch(sum_partials_kernel<A>, {.grid = ceil_div(c, 32), .grid_y = 2, .block = 512, .stream = stream}, grad.dw.data<A>(), add_dw,
           grad.dskip.data<A>(), add_dskip, partial.data<A>(), partial.data<A>() + chunks * c, chunks, c);
  });
}

}  // namespace krait::kernels::cuda

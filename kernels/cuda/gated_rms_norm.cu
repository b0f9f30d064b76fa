#include "kernels/gated_rms_norm.h"

#include "kernels/cuda/gate.cuh"
#include "kernels/cuda/multiprocessors.h"
#include "kernels/cuda/norm_backward.cuh"

// Bound by memory: forward 3 r e sizeof(T) bytes, backward 5 (6 with y). A warp or a block holds a group of a row in
// registers; other rows (odd widths, more than 4096 channels, fp64) are read twice.
namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 256;

// Gate for bf16: a few units in the last place of fp32 do not show.
struct QuickGate {
  float s, slope;
  __device__ explicit QuickGate(float z) {
    const float c = fmaxf(z, -80.0f), sigmoid = __fdividef(1.0f, 1.0f + __expf(-c));
    s = c * sigmoid;
    slope = sigmoid * (1.0f + c * (1.0f - sigmoid));
  }
};
template <class T> using gate_of = std::conditional_t<std::is_same_v<T, bf16>, QuickGate, Gate<float>>;

// Pointers at column 0 of the group blockIdx.y; rows are e apart, those of z and dz z_row and dz_row.
struct RowSizes { int64_t r, e, z_row, dz_row; int c; };

template <class T, int kGroup, int kEach>
__global__ void __launch_bounds__(block_of(kGroup))
    gated_forward_kernel(T* __restrict__ y, float* __restrict__ rstd, const T* __restrict__ x, const T* __restrict__ z,
                         const float* __restrict__ w, RowSizes d, float eps, bool norm_first) {
  constexpr int V = 16 / sizeof(T), kVectors = kEach / V;
  const int lane = static_cast<int>(threadIdx.x) % kGroup;
  const int64_t row = int64_t{blockIdx.x} * groups_of(kGroup) + threadIdx.x / kGroup, start = int64_t{blockIdx.y} * d.c;
  if (row >= d.r) return;  // a whole group
  float u[kVectors][V], sum[1] = {0};
  Packed<T, V> xs[kVectors], zs[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int col = (k * kGroup + lane) * V;
    if (col >= d.c) continue;
    xs[k].load(x + row * d.e + start + col);
    zs[k].load(z + row * d.z_row + start + col);
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    if ((k * kGroup + lane) * V >= d.c) continue;
    float gate[V];
    xs[k].unpack(u[k]);
    zs[k].unpack(gate);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float v = u[k][i];
      u[k][i] *= gate_of<T>(gate[i]).s;
      sum[0] += norm_first ? v * v : u[k][i] * u[k][i];
    }
  }
  group_sum<kGroup>(sum);
  const float scale = 1.0f / sqrtf(sum[0] / static_cast<float>(d.c) + eps);
  if (lane == 0) rstd[row * gridDim.y + blockIdx.y] = scale;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int col = (k * kGroup + lane) * V;
    if (col >= d.c) continue;
    float weight[V];
    load_values(weight, w + start + col);
#pragma unroll
    for (int i = 0; i < V; ++i) u[k][i] *= scale * weight[i];
    store_values(y + row * d.e + start + col, u[k]);
  }
}

// In bf16 the next row comes in while this one is worked on.
template <class T, int kGroup, int kEach>
__global__ void __launch_bounds__(kGroup, 512 / kGroup)
    gated_backward_kernel(T* __restrict__ dx, T* __restrict__ dz, T* __restrict__ y, float* __restrict__ partial_w,
                          const T* __restrict__ dy, const T* __restrict__ x, const T* __restrict__ z,
                          const float* __restrict__ w, const float* __restrict__ rstd, RowSizes d, bool norm_first) {
  constexpr int V = 16 / sizeof(T), kVectors = kEach / V;
  constexpr bool kAhead = sizeof(T) == 2;
  struct Row { Packed<T, V> x[kVectors], z[kVectors], up[kVectors]; };
  struct Values { float x[V], z[V], up[V], weight[V]; };
  const int64_t start = int64_t{blockIdx.y} * d.c;
  const auto column = [](int k) { return (k * kGroup + static_cast<int>(threadIdx.x)) * V; };
  const auto load = [&](Row& to, int64_t row) {
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (column(k) >= d.c) continue;
      to.x[k].load(x + row * d.e + start + column(k));
      to.z[k].load(z + row * d.z_row + start + column(k));
      to.up[k].load(dy + row * d.e + start + column(k));
    }
  };
  const auto unpack = [&](const Row& row, int k) {
    Values to;
    row.x[k].unpack(to.x);
    row.z[k].unpack(to.z);
    row.up[k].unpack(to.up);
    load_values(to.weight, w + start + column(k));
    return to;
  };

  float dw[kVectors][V] = {};
  Row now, next;
  if (blockIdx.x < d.r) load(now, blockIdx.x);
  for (int64_t row = blockIdx.x; row < d.r; row += gridDim.x) {
    const bool more = row + gridDim.x < d.r;
    if (kAhead && more) load(next, row + gridDim.x);
    const float scale = rstd[row * gridDim.y + blockIdx.y];
    float sum[1] = {0};
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      if (column(k) >= d.c) continue;
      const Values in = unpack(now, k);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float product = in.up[i] * in.x[i] * gate_of<T>(in.z[i]).s * scale;  // t vhat, whichever of the two holds s
        dw[k][i] += product;
        sum[0] += product * in.weight[i];
      }
    }
    group_sum<kGroup>(sum);
    const float mean = sum[0] / static_cast<float>(d.c);
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int col = column(k);
      if (col >= d.c) continue;
      Values in = unpack(now, k);
      float out[V], dgate[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const gate_of<T> g(in.z[i]);
        const float v = in.x[i], up = in.up[i], weight = in.weight[i];
        const float t = norm_first ? up * g.s : up, vhat = (norm_first ? v : v * g.s) * scale;
        const float dv = scale * (t * weight - vhat * mean);
        out[i] = norm_first ? dv : dv * g.s;
        dgate[i] = (norm_first ? up * vhat * weight : dv * v) * g.slope;
        in.x[i] *= g.s * scale * weight;
      }
      store_values(dx + row * d.e + start + col, out);
      store_values(dz + row * d.dz_row + start + col, dgate);
      if (y != nullptr) store_values(y + row * d.e + start + col, in.x);
    }
    if constexpr (kAhead)
      now = next;
    else if (more)
      load(now, row + gridDim.x);
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k)
    if (column(k) < d.c) store_values(partial_w + int64_t{blockIdx.x} * d.e + start + column(k), dw[k]);
}

template <class T, class A = accum_t<T>>
__global__ void __launch_bounds__(kThreads)
    gated_rms_norm_forward_kernel(T* y, A* rstd, const T* x, const T* z, const A* w, int64_t e, int64_t c,
                                  int64_t z_row, A eps, bool norm_first) {
  const int64_t row = blockIdx.x, groups = e / c;
  x += row * e;
  y += row * e;
  z += row * z_row;
  for (int64_t g = 0; g < groups; ++g) {
    A sum[1] = {0};
    for (int64_t j = g * c + threadIdx.x; j < (g + 1) * c; j += kThreads) {
      A v = static_cast<A>(x[j]);
      if (!norm_first) v *= Gate<A>(static_cast<A>(z[j])).s;
      sum[0] += v * v;
    }
    group_sum<kThreads>(sum);
    const A scale = A(1) / sqrt(sum[0] / static_cast<A>(c) + eps);
    if (threadIdx.x == 0) rstd[row * groups + g] = scale;
    for (int64_t j = g * c + threadIdx.x; j < (g + 1) * c; j += kThreads)
      y[j] = static_cast<T>(static_cast<A>(x[j]) * Gate<A>(static_cast<A>(z[j])).s * scale * w[j]);
  }
}

template <class T, class A = accum_t<T>>
__global__ void __launch_bounds__(kThreads)
    gated_rms_norm_backward_kernel(T* dx, T* dz, T* y, A* partial_w, const T* dy, const T* x, const T* z, const A* w,
                                   const A* rstd, int64_t r, int64_t e, int64_t c, int64_t z_row, int64_t dz_row,
                                   bool norm_first) {
  A* dw = partial_w + int64_t{blockIdx.x} * e;
  const int64_t groups = e / c;
  for (int64_t row = blockIdx.x; row < r; row += gridDim.x) {
    const int64_t at = row * e;
    for (int64_t g = 0; g < groups; ++g) {
      const A scale = rstd[row * groups + g];
      A sum[1] = {0};
      for (int64_t j = g * c + threadIdx.x; j < (g + 1) * c; j += kThreads) {  // a thread's columns are its own
        const A up = static_cast<A>(dy[at + j]), v = static_cast<A>(x[at + j]);
        const A s = Gate<A>(static_cast<A>(z[row * z_row + j])).s;
        const A product = up * v * s * scale;  // t vhat, whichever of the two holds s
        dw[j] = row == blockIdx.x ? product : dw[j] + product;
        sum[0] += product * w[j];
      }
      group_sum<kThreads>(sum);
      const A mean = sum[0] / static_cast<A>(c);
      for (int64_t j = g * c + threadIdx.x; j < (g + 1) * c; j += kThreads) {
        const A up = static_cast<A>(dy[at + j]), v = static_cast<A>(x[at + j]);
        const Gate<A> gate(static_cast<A>(z[row * z_row + j]));
        const A t = norm_first ? up * gate.s : up, vhat = (norm_first ? v : v * gate.s) * scale;
        const A dv = scale * (t * w[j] - vhat * mean);
        dx[at + j] = static_cast<T>(norm_first ? dv : dv * gate.s);
        dz[row * dz_row + j] = static_cast<T>((norm_first ? up * vhat * w[j] : dv * v) * gate.slope);
        if (y != nullptr) y[at + j] = static_cast<T>(v * gate.s * scale * w[j]);
      }
    }
  }
}

// Whether the rows of a group fit in the registers of a block.
template <class T>
bool fits(int64_t c) {
  return !std::is_same_v<T, double> && c <= 4096 && c % (16 / static_cast<int64_t>(sizeof(T))) == 0;
}

template <class T>
bool rows_aligned(const Tensor& t) {
  return aligned16(t.data<T>()) && t.stride(0) * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

}  // namespace

void gated_rms_norm_forward(Tensor& y, Tensor& rstd, const Tensor& x, const Tensor& z, const Tensor& w, double eps,
                            bool norm_first) {
  const int64_t r = x.size(0), e = x.size(1), groups = rstd.size(1), c = e / groups;
  const Stream stream = current_stream(x.device());
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    if constexpr (!std::is_same_v<T, double>) {
      if (fits<T>(c) && rows_aligned<T>(x) && rows_aligned<T>(y) && rows_aligned<T>(z) && aligned16(w.data<A>())) {
        const auto run = [&]<int kGroup, int kEach>() {
          launch(gated_forward_kernel<T, kGroup, kEach>,
                 {.grid = ceil_div(r, groups_of(kGroup)), .grid_y = groups, .block = block_of(kGroup), .stream = stream},
                 y.data<T>(), rstd.data<float>(), x.data<T>(), z.data<T>(), w.data<float>(),
                 RowSizes{r, e, z.stride(0), 0, static_cast<int>(c)}, eps, norm_first);
        };
        if (c <= 1536) return run.template operator()<32, 48>();
        return run.template operator()<256, 16>();
      }
    }
    launch(gated_rms_norm_forward_kernel<T>, {.grid = r, .block = kThreads, .stream = stream}, y.data<T>(),
           rstd.data<A>(), x.data<T>(), z.data<T>(), w.data<A>(), e, c, z.stride(0), eps, norm_first);
  });
}

void gated_rms_norm_backward(Tensor& dx, Tensor& dz, Tensor& y, Tensor& dw, bool add_dw, const Tensor& dy,
                             const Tensor& x, const Tensor& z, const Tensor& w, const Tensor& rstd, bool norm_first) {
  const int64_t r = x.size(0), e = x.size(1), groups = rstd.size(1), c = e / groups;
  const Stream stream = current_stream(x.device());
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    T* y_again = pointer_or_null<T>(y);
    Tensor partial;
    if constexpr (!std::is_same_v<T, double>) {
      if (fits<T>(c) && rows_aligned<T>(x) && rows_aligned<T>(dy) && rows_aligned<T>(dx) && rows_aligned<T>(z) &&
          rows_aligned<T>(dz) && aligned16(y_again, w.data<A>())) {
        const auto run = [&]<int kGroup>() {
          partial = empty({std::min<int64_t>(r, kMultiprocessors * (512 / kGroup)), e}, DType::f32, x.device());
          launch(gated_backward_kernel<T, kGroup, 16>,
                 {.grid = partial.size(0), .grid_y = groups, .block = kGroup, .stream = stream}, dx.data<T>(), dz.data<T>(),
                 y_again, partial.data<float>(), dy.data<T>(), x.data<T>(), z.data<T>(), w.data<float>(),
                 rstd.data<float>(), RowSizes{r, e, z.stride(0), dz.stride(0), static_cast<int>(c)}, norm_first);
        };
        if (c <= 1536)
          run.template operator()<96>();
        else if (c <= 2048)
          run.template operator()<128>();
        else
          run.template operator()<256>();
      }
    }
    if (!partial.defined()) {
      partial = empty({std::min<int64_t>(r, 4 * kMultiprocessors), e}, dtype_of<A>, x.device());
      launch(gated_rms_norm_backward_kernel<T>, {.grid = partial.size(0), .block = kThreads, .stream = stream},
             dx.data<T>(), dz.data<T>(), y_again, partial.data<A>(), dy.data<T>(), x.data<T>(), z.data<T>(), w.data<A>(),
             rstd.data<A>(), r, e, c, z.stride(0), dz.stride(0), norm_first);
    }
    launch(sum_partials_kernel<A>, {.grid = ceil_div(e, 32), .block = 512, .stream = stream}, dw.data<A>(), add_dw,
           static_cast<A*>(nullptr), false, partial.data<A>(), static_cast<A*>(nullptr), partial.size(0), e);
  });
}

}  // namespace krait::kernels::cuda

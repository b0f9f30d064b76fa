#include "kernels/gated_rms_norm_split.h"

#include "kernels/cuda/gate.cuh"
#include "kernels/cuda/multiprocessors.h"
#include "kernels/cuda/norm_backward.cuh"

// Bound by memory: squares 2 r e sizeof(T) bytes, apply and dots 3, backward 5 (6 with y).
namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 256;

struct Sizes { int64_t r, e, groups, c, z_row, dz_row; };

enum class Task { squares, apply, dots };

// A warp takes a group of a row: sums over it, or y.
template <Task kTask, int V, class T, class A = accum_t<T>>
__global__ void __launch_bounds__(kWarpBlock)
    group_kernel(A* __restrict__ sums, T* __restrict__ y, const T* __restrict__ dy, const T* __restrict__ x,
                 const T* __restrict__ z, const A* __restrict__ w, const A* __restrict__ rstd, Sizes d, bool norm_first) {
  const int64_t at = int64_t{blockIdx.x} * (kWarpBlock / 32) + threadIdx.x / 32;
  if (at >= d.r * d.groups) return;
  const int64_t row = at / d.groups, start = at % d.groups * d.c;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  x += row * d.e + start;
  z += row * d.z_row + start;
  if constexpr (kTask != Task::squares) w += start;
  const A scale = kTask == Task::squares ? A(1) : rstd[at];
  A sum[1] = {0};
#pragma unroll 2
  for (int64_t col = int64_t{lane} * V; col < d.c; col += 32 * V) {
    A v[V], gate[V], other[V];
    load_values(v, x + col);
    load_values(gate, z + col);
    if constexpr (kTask == Task::dots) load_values(other, dy + row * d.e + start + col);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if constexpr (kTask == Task::squares) {
        const A u = norm_first ? v[i] : v[i] * Gate<A>(gate[i]).s;
        sum[0] += u * u;
      } else {
        v[i] *= Gate<A>(gate[i]).s * scale * w[col + i];
        if constexpr (kTask == Task::dots) sum[0] += v[i] * other[i];
      }
    }
    if constexpr (kTask == Task::apply) store_values(y + row * d.e + start + col, v);
  }
  if constexpr (kTask != Task::apply) {
    group_sum<32>(sum);
    if (lane == 0) sums[at] = sum[0];
  }
}

// A block takes every gridDim.x-th row; a thread's columns are its own, so that their sums need no exchange. They are kept
// in shared memory where they fit (kShared), else where they are wanted.
template <bool kShared, int V, class T, class A = accum_t<T>>
__global__ void __launch_bounds__(kThreads)
    split_backward_kernel(T* __restrict__ dx, T* __restrict__ dz, T* __restrict__ y, A* __restrict__ partial_w,
                          const T* __restrict__ dy, const T* __restrict__ x, const T* __restrict__ z,
                          const A* __restrict__ w, const A* __restrict__ rstd, const A* __restrict__ mean, Sizes d,
                          bool norm_first) {
  extern __shared__ __align__(16) unsigned char shared[];
  A* const own = partial_w + int64_t{blockIdx.x} * d.e;
  A* const dw = kShared ? reinterpret_cast<A*>(shared) : own;
  const int64_t first = int64_t{threadIdx.x} * V;
  for (int64_t col = first; col < d.e; col += kThreads * V)
#pragma unroll
    for (int i = 0; i < V; ++i) dw[col + i] = 0;
  for (int64_t row = blockIdx.x; row < d.r; row += gridDim.x) {
    for (int64_t col = first; col < d.e; col += kThreads * V) {  // V columns lie in one group
      A xv[V], gate[V], up[V], out[V], dgate[V], again[V];
      load_values(xv, x + row * d.e + col);
      load_values(gate, z + row * d.z_row + col);
      load_values(up, dy + row * d.e + col);
      const int64_t group = row * d.groups + col / d.c;
      const A scale = rstd[group], centre = mean[group];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const Gate<A> g(gate[i]);
        const A weight = w[col + i];
        const A t = norm_first ? up[i] * g.s : up[i], vhat = (norm_first ? xv[i] : xv[i] * g.s) * scale;
        const A dv = scale * (t * weight - vhat * centre);
        dw[col + i] += t * vhat;
        out[i] = norm_first ? dv : dv * g.s;
        dgate[i] = (norm_first ? up[i] * vhat * weight : dv * xv[i]) * g.slope;
        again[i] = xv[i] * g.s * scale * weight;
      }
      store_values(dx + row * d.e + col, out);
      store_values(dz + row * d.dz_row + col, dgate);
      if (y != nullptr) store_values(y + row * d.e + col, again);
    }
  }
  if constexpr (kShared)
    for (int64_t col = first; col < d.e; col += kThreads * V)
#pragma unroll
      for (int i = 0; i < V; ++i) own[col + i] = dw[col + i];
}

template <class T>
bool rows_aligned(const Tensor& t) {
  return aligned16(t.data<T>()) && t.stride(0) * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

// f.template operator()<V>(): 16 bytes at a time where the groups allow it.
template <class T, class F>
void visit_width(const Sizes& d, std::initializer_list<const Tensor*> rows, F f) {
  constexpr int V = 16 / static_cast<int>(sizeof(T));
  bool wide = d.c % V == 0;
  for (const Tensor* t : rows) wide = wide && (!t->defined() || rows_aligned<T>(*t));
  if (wide)
    f.template operator()<V>();
  else
    f.template operator()<1>();
}

Sizes sizes_of(const Tensor& x, const Tensor& z, int64_t groups) {
  return {x.size(0), x.size(1), groups, x.size(1) / groups, z.stride(0), 0};
}

template <Task kTask>
void run_groups(Tensor* sums, Tensor* y, const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& w,
                const Tensor& rstd, int64_t groups, bool norm_first) {
  const Sizes d = sizes_of(x, z, groups);
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    visit_width<T>(d, {&x, &z, &dy}, [&]<int V>() {
      launch(group_kernel<kTask, V, T>,
             {.grid = ceil_div(d.r * d.groups, kWarpBlock / 32), .block = kWarpBlock, .stream = current_stream(x.device())},
             sums ? sums->data<A>() : nullptr, y ? y->data<T>() : nullptr, pointer_or_null<T>(dy), x.data<T>(), z.data<T>(),
             pointer_or_null<A>(w), pointer_or_null<A>(rstd), d, norm_first);
    });
  });
}

}  // namespace

void gated_rms_norm_squares(Tensor& squares, const Tensor& x, const Tensor& z, bool norm_first) {
  run_groups<Task::squares>(&squares, nullptr, {}, x, z, {}, {}, squares.size(1), norm_first);
}

void gated_rms_norm_apply(Tensor& y, const Tensor& x, const Tensor& z, const Tensor& w, const Tensor& rstd) {
  run_groups<Task::apply>(nullptr, &y, {}, x, z, w, rstd, rstd.size(1), false);
}

void gated_rms_norm_dots(Tensor& dots, const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& w,
                         const Tensor& rstd) {
  run_groups<Task::dots>(&dots, nullptr, dy, x, z, w, rstd, rstd.size(1), false);
}

void gated_rms_norm_backward_split(Tensor& dx, Tensor& dz, Tensor& y, Tensor& dw, bool add_dw, const Tensor& dy,
                                   const Tensor& x, const Tensor& z, const Tensor& w, const Tensor& rstd,
                                   const Tensor& mean, bool norm_first) {
  Sizes d = sizes_of(x, z, rstd.size(1));
  d.dz_row = dz.stride(0);
  const Stream stream = current_stream(x.device());
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Tensor partial = empty({std::min<int64_t>(d.r, 8 * kMultiprocessors), d.e}, dtype_of<A>, x.device());
    const int64_t bytes = d.e * static_cast<int64_t>(sizeof(A));
    visit_width<T>(d, {&x, &z, &dy, &dx, &dz, &y}, [&]<int V>() {
      const bool fits = bytes <= 24 * 1024;
      launch(fits ? split_backward_kernel<true, V, T> : split_backward_kernel<false, V, T>,
             {.grid = partial.size(0), .block = kThreads, .shared = fits ? bytes : 0, .stream = stream}, dx.data<T>(),
             dz.data<T>(), pointer_or_null<T>(y), partial.data<A>(), dy.data<T>(), x.data<T>(), z.data<T>(), w.data<A>(),
             rstd.data<A>(), mean.data<A>(), d, norm_first);
    });
    launch(sum_partials_kernel<A>, {.grid = ceil_div(d.e, 32), .block = 512, .stream = stream}, dw.data<A>(), add_dw,
           static_cast<A*>(nullptr), false, partial.data<A>(), static_cast<A*>(nullptr), partial.size(0), d.e);
  });
}

}  // namespace krait::kernels::cuda

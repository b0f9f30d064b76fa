#include "kernels/s4_scan.h"

#include "core/cuda/launch.cuh"
#include "kernels/cuda/aligned.h"
#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/fft.cuh"

namespace krait::kernels::cuda {

namespace {

// One warp per (sequence, channel); lane i holds the states i, i + 32, ... Positions go 32 at a time: lane k reads u at
// the k-th and sums the lanes' parts of its y, which pass through shared memory.
constexpr int kPiece = 32;
constexpr unsigned kAll = 0xFFFFFFFFu;

template <class A>
using PartTile = A[kPiece][33];

template <class A>
__device__ __forceinline__ A warp_sum(A v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kAll, v, offset);
  return v;
}

/// The sum over lanes of what each wrote for position `lane`.
template <class A>
__device__ __forceinline__ A row_sum(const PartTile<A>& part, int lane) {
  A sum = A(0);
#pragma unroll
  for (int k = 0; k < 32; ++k) sum += part[lane][k];
  return sum;
}

/// Bit k: a document begins at t0 + k, inside the row.
__device__ __forceinline__ unsigned begin_mask(const int32_t* segments, int64_t t0, int64_t l, int lane) {
  const int64_t t = t0 + lane;
  return __ballot_sync(kAll, segments && t > 0 && t < l && segments[t] != segments[t - 1]);
}

template <class A>
__device__ __forceinline__ Complex<A> complex_at(const A* p, int64_t i) {
  return {p[2 * i], p[2 * i + 1]};
}

template <class T, class A, int J>
__global__ void __launch_bounds__(128)
    s4_scan_forward_kernel(T* y, A* last, const T* __restrict__ u, const A* __restrict__ a, const A* __restrict__ b,
                           const A* __restrict__ c, const A* __restrict__ d, const A* __restrict__ m,
                           const A* __restrict__ q, const A* __restrict__ x0, const int32_t* __restrict__ segments,
                           int64_t rows, int64_t l, int64_t h, int n, int rank) {
  __shared__ PartTile<A> parts[4];
  const int lane = threadIdx.x % 32;
  const int64_t item = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  if (item >= rows) return;  // whole warps
  PartTile<A>& part = parts[threadIdx.x / 32];
  const int64_t row = item / h, channel = item % h;
  u += row * l * h + channel;
  y += row * l * h + channel;
  if (segments) segments += row * l;
  Complex<A> x[J], aj[J], bj[J], cj[J];
#pragma unroll
  for (int j = 0; j < J; ++j) {
    const int i = lane + 32 * j;
    x[j] = aj[j] = bj[j] = cj[j] = {A(0), A(0)};
    if (i >= n) continue;
    x[j] = complex_at(x0, item * n + i);
    aj[j] = complex_at(a, channel * n + i);
    bj[j] = complex_at(b, channel * n + i);
    cj[j] = complex_at(c, channel * n + i);
  }
  const A skip = d ? d[channel] : A(0);
  for (int64_t t0 = 0; t0 < l; t0 += kPiece) {
    const int count = static_cast<int>(min(int64_t{kPiece}, l - t0));
    const unsigned begin = begin_mask(segments, t0, l, lane);
    const A own_u = lane < count ? static_cast<A>(u[(t0 + lane) * h]) : A(0);
    for (int k = 0; k < count; ++k) {
      const A ut = __shfl_sync(kAll, own_u, k);
      const A keep = begin >> k & 1 ? A(0) : A(1);
      Complex<A> next[J];
#pragma unroll
      for (int j = 0; j < J; ++j) {
        x[j] = keep * x[j];
        next[j] = aj[j] * x[j] + ut * bj[j];
      }
      for (int r = 0; r < rank; ++r) {
        A dot = A(0);
#pragma unroll
        for (int j = 0; j < J; ++j)
          if (const int i = lane + 32 * j; i < n) dot += (complex_at(q, (channel * rank + r) * n + i) * x[j]).re;
        dot = 2 * warp_sum(dot);
#pragma unroll
        for (int j = 0; j < J; ++j)
          if (const int i = lane + 32 * j; i < n)
            next[j] = next[j] - dot * complex_at(m, (channel * rank + r) * n + i);
      }
      A sum = A(0);
#pragma unroll
      for (int j = 0; j < J; ++j) {
        x[j] = next[j];
        sum += (cj[j] * x[j]).re;
      }
      part[k][lane] = sum;
    }
    __syncwarp();
    if (lane < count) y[(t0 + lane) * h] = static_cast<T>(2 * row_sum<A>(part, lane) + skip * own_u);
    __syncwarp();
  }
#pragma unroll
  for (int j = 0; j < J; ++j)
    if (const int i = lane + 32 * j; i < n) {
      last[2 * (item * n + i)] = x[j].re;
      last[2 * (item * n + i) + 1] = x[j].im;
    }
}

// As on the CPU: forward again, keeping every 32nd state in `kept` (rows, pieces, n, 2), then from the end piece by
// piece, whose states are computed once more into shared memory.
template <class T, class A, int J>
__global__ void __launch_bounds__(64)
    s4_scan_backward_kernel(T* du, A* da, A* db, A* dc, A* dd, A* dx0, A* kept, const T* __restrict__ dy,
                            const A* __restrict__ dlast, const T* __restrict__ u, const A* __restrict__ a,
                            const A* __restrict__ b, const A* __restrict__ c, const A* __restrict__ d,
                            const A* __restrict__ x0, const int32_t* __restrict__ segments, int64_t rows, int64_t l,
                            int64_t h, int n) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t item = int64_t{blockIdx.x} * 2 + warp;
  if (item >= rows) return;  // whole warps
  PartTile<A>& part = reinterpret_cast<PartTile<A>*>(shared)[warp];
  // states[k][j][lane]: before position t0 + k
  Complex<A>* states = reinterpret_cast<Complex<A>*>(shared + 2 * sizeof(PartTile<A>)) + warp * kPiece * J * 32;
  const int64_t row = item / h, channel = item % h, pieces = (l + kPiece - 1) / kPiece;
  u += row * l * h + channel;
  dy += row * l * h + channel;
  du += row * l * h + channel;
  if (segments) segments += row * l;
  kept += item * pieces * n * 2;
  Complex<A> x[J], aj[J], bj[J], cj[J], g[J], sa[J], sb[J], sc[J];
#pragma unroll
  for (int j = 0; j < J; ++j) {
    const int i = lane + 32 * j;
    x[j] = aj[j] = bj[j] = cj[j] = g[j] = sa[j] = sb[j] = sc[j] = {A(0), A(0)};
    if (i >= n) continue;
    x[j] = complex_at(x0, item * n + i);
    g[j] = complex_at(dlast, item * n + i);
    aj[j] = complex_at(a, channel * n + i);
    bj[j] = complex_at(b, channel * n + i);
    cj[j] = complex_at(c, channel * n + i);
  }
  const A skip = d ? d[channel] : A(0);
  for (int64_t t0 = 0; t0 < l; t0 += kPiece) {
    const int count = static_cast<int>(min(int64_t{kPiece}, l - t0));
    const unsigned begin = begin_mask(segments, t0, l, lane);
    const A own_u = lane < count ? static_cast<A>(u[(t0 + lane) * h]) : A(0);
#pragma unroll
    for (int j = 0; j < J; ++j)
      if (const int i = lane + 32 * j; i < n) {
        kept[2 * (t0 / kPiece * n + i)] = x[j].re;
        kept[2 * (t0 / kPiece * n + i) + 1] = x[j].im;
      }
    for (int k = 0; k < count; ++k) {
      const A ut = __shfl_sync(kAll, own_u, k), keep = begin >> k & 1 ? A(0) : A(1);
#pragma unroll
      for (int j = 0; j < J; ++j) x[j] = aj[j] * (keep * x[j]) + ut * bj[j];
    }
  }
  A sd = A(0);
  for (int64_t p = pieces - 1; p >= 0; --p) {
    const int64_t t0 = p * kPiece;
    const int count = static_cast<int>(min(int64_t{kPiece}, l - t0));
    const unsigned begin = begin_mask(segments, t0, l, lane);
    const A own_u = lane < count ? static_cast<A>(u[(t0 + lane) * h]) : A(0);
    const A own_g = lane < count ? static_cast<A>(dy[(t0 + lane) * h]) : A(0);
    sd += own_u * own_g;
#pragma unroll
    for (int j = 0; j < J; ++j) {
      const int i = lane + 32 * j;
      x[j] = i < n ? complex_at(kept, p * n + i) : Complex<A>{A(0), A(0)};
    }
    for (int k = 0; k < count; ++k) {
      const A ut = __shfl_sync(kAll, own_u, k), keep = begin >> k & 1 ? A(0) : A(1);
#pragma unroll
      for (int j = 0; j < J; ++j) {
        x[j] = keep * x[j];
        states[(k * J + j) * 32 + lane] = x[j];  // read by this lane alone
        x[j] = aj[j] * x[j] + ut * bj[j];
      }
    }
    for (int k = count - 1; k >= 0; --k) {
      const A ut = __shfl_sync(kAll, own_u, k), gy = __shfl_sync(kAll, own_g, k);
      const A keep = begin >> k & 1 ? A(0) : A(1);
      A sum = A(0);
#pragma unroll
      for (int j = 0; j < J; ++j) {
        const Complex<A> gt = g[j] + (2 * gy) * conj(cj[j]), before = states[(k * J + j) * 32 + lane];
        sa[j] = sa[j] + conj(before) * gt;
        sb[j] = sb[j] + ut * gt;
        sc[j] = sc[j] + (2 * gy) * conj(x[j]);
        sum += (conj(bj[j]) * gt).re;
        g[j] = keep * (conj(aj[j]) * gt);
        x[j] = before;
      }
      part[k][lane] = sum;
      // x is the state after position k - 1 only where no document begins at k; states[k - 1] then gives it again.
      if (begin >> k & 1 && k > 0) {
        const A up = __shfl_sync(kAll, own_u, k - 1);
#pragma unroll
        for (int j = 0; j < J; ++j) x[j] = aj[j] * states[((k - 1) * J + j) * 32 + lane] + up * bj[j];
      }
    }
    __syncwarp();
    if (lane < count) du[(t0 + lane) * h] = static_cast<T>(row_sum<A>(part, lane) + skip * own_g);
    __syncwarp();
  }
  const auto put = [&](A* to, int i, Complex<A> v) {
    to[2 * (item * n + i)] = v.re;
    to[2 * (item * n + i) + 1] = v.im;
  };
#pragma unroll
  for (int j = 0; j < J; ++j)
    if (const int i = lane + 32 * j; i < n) {
      put(da, i, sa[j]);
      put(db, i, sb[j]);
      put(dc, i, sc[j]);
      put(dx0, i, g[j]);
    }
  sd = warp_sum(sd);
  if (dd && lane == 0) dd[item] = sd;
}

// One block per (sequence, channel), one thread per state; a control for ablations, not tuned.
template <class T, class A>
__global__ void dense_scan_kernel(T* y, A* last, const T* __restrict__ u, const A* __restrict__ columns,
                                  const A* __restrict__ b, const A* __restrict__ c, const A* __restrict__ d,
                                  const A* __restrict__ x0, const int32_t* __restrict__ segments, int64_t l, int64_t h,
                                  int n) {
  extern __shared__ __align__(16) unsigned char shared[];
  A* x = reinterpret_cast<A*>(shared);
  __shared__ A scratch[32];
  const int i = threadIdx.x;
  const int64_t item = blockIdx.x, row = item / h, channel = item % h;
  columns += channel * n * n;
  if (segments) segments += row * l;
  const A bi = i < n ? b[channel * n + i] : A(0), ci = i < n ? c[channel * n + i] : A(0);
  A own = i < n ? x0[item * n + i] : A(0);
  for (int64_t t = 0; t < l; ++t) {
    const int64_t at = (row * l + t) * h + channel;
    const A ut = static_cast<A>(u[at]);
    if (segments && t > 0 && segments[t] != segments[t - 1]) own = A(0);
    if (i < n) x[i] = own;
    __syncthreads();
    own = bi * ut;
    if (i < n)
      for (int k = 0; k < n; ++k) own += columns[int64_t{k} * n + i] * x[k];
    __syncthreads();
    const A sum = block_reduce(ci * own, scratch, [](A p, A q) { return p + q; });
    if (i == 0) y[at] = static_cast<T>(sum + (d ? d[channel] * ut : A(0)));
  }
  if (i < n) last[item * n + i] = own;
}

// f.operator()<J>() with J states a lane.
template <class F>
void visit_states(int64_t n, F&& f) {
  KRAIT_CHECK(n <= 128, "s4_scan on CUDA holds at most 128 complex states a channel, found {}; use d_state <= 256", n);
  if (n <= 32) return f.template operator()<1>();
  if (n <= 64) return f.template operator()<2>();
  f.template operator()<4>();
}

}  // namespace

void s4_scan_forward(Tensor& y, Tensor& last, const Tensor& u, const S4System& s, const Tensor& x0,
                     const Tensor& segments) {
  const int64_t rows = u.size(0) * u.size(2), n = s.A.size(1);
  visit_float(u.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    visit_states(n, [&]<int J>() {
      launch(s4_scan_forward_kernel<T, A, J>,
             {.grid = ceil_div(rows, 4), .block = 128, .stream = current_stream(u.device())}, y.data<T>(),
             last.data<A>(), u.data<T>(), s.A.data<A>(), s.B.data<A>(), s.C.data<A>(), pointer_or_null<A>(s.D),
             pointer_or_null<A>(s.M), pointer_or_null<A>(s.Q), x0.data<A>(), pointer_or_null<int32_t>(segments), rows, u.size(1),
             u.size(2), n, s.M.defined() ? s.M.size(1) : int64_t{0});
    });
  });
}

void s4_scan_backward(S4ScanGrad& grad, const Tensor& dy, const Tensor& dlast, const Tensor& u, const S4System& s,
                      const Tensor& x0, const Tensor& segments) {
  const int64_t rows = u.size(0) * u.size(2), l = u.size(1), n = s.A.size(1);
  Tensor kept = empty({rows, ceil_div(l, kPiece), n, 2}, x0.dtype(), u.device());
  visit_float(u.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    visit_states(n, [&]<int J>() {
      launch(s4_scan_backward_kernel<T, A, J>,
             {.grid = ceil_div(rows, 2),
              .block = 64,
              .shared = static_cast<int64_t>(2 * (sizeof(PartTile<A>) + kPiece * J * 32 * sizeof(Complex<A>))),
              .stream = current_stream(u.device())},
             grad.du.data<T>(), grad.dA.data<A>(), grad.dB.data<A>(), grad.dC.data<A>(),
             grad.dD.defined() ? grad.dD.data<A>() : nullptr, grad.dx0.data<A>(), kept.data<A>(), dy.data<T>(),
             dlast.data<A>(), u.data<T>(), s.A.data<A>(), s.B.data<A>(), s.C.data<A>(), pointer_or_null<A>(s.D),
             x0.data<A>(), pointer_or_null<int32_t>(segments), rows, l, u.size(2), n);
    });
  });
}

void dense_scan_forward(Tensor& y, Tensor& last, const Tensor& u, const S4System& s, const Tensor& x0,
                        const Tensor& segments) {
  const int64_t n = s.A.size(1);
  KRAIT_CHECK(n <= 1024, "dense_scan on CUDA holds at most 1024 states a channel, found {}", n);
  visit_float(u.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    launch(dense_scan_kernel<T, A>,
           {.grid = u.size(0) * u.size(2),
            .block = static_cast<int>(ceil_div(n, 32) * 32),
            .shared = n * static_cast<int64_t>(sizeof(A)),
            .stream = current_stream(u.device())},
           y.data<T>(), last.data<A>(), u.data<T>(), s.A.data<A>(), s.B.data<A>(), s.C.data<A>(),
           pointer_or_null<A>(s.D), x0.data<A>(), pointer_or_null<int32_t>(segments), u.size(1), u.size(2), n);
  });
}

}  // namespace krait::kernels::cuda

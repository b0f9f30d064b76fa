#include "kernels/cross_entropy.h"

#include <limits>

#include "core/cuda/launch.cuh"
#include "kernels/cuda/aligned.h"
#include "kernels/cuda/exp2.cuh"

namespace krait::kernels::cuda {

namespace {

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }
__device__ inline float tanh_of(float x) { return tanhf(x); }
__device__ inline double tanh_of(double x) { return tanh(x); }

// Of logits stored in T: for bf16 the hardware's exponential, whose error is far below their rounding.
template <class T, class A>
__device__ A exp_for(A x) {
  if constexpr (std::is_same_v<T, bf16>)
    return __expf(x);
  else
    return exp_of(x);
}

// exp(x - shift). For bf16 as a power of two: one multiply-add and the hardware's function.
template <class T, class A>
struct ShiftedExp {
  A shift;  // of the argument; for bf16 times log2 e
  __device__ explicit ShiftedExp(A by) : shift(by) {
    if constexpr (std::is_same_v<T, bf16>) shift = fmaxf(by, -1e38f) * kLog2e;  // finite: -infinity - shift must be
  }
  __device__ A operator()(A x) const {
    if constexpr (std::is_same_v<T, bf16>) {
      return exp2_fast(fmaf(x, kLog2e, -shift));
    } else {
      return exp_of(x - shift);
    }
  }
};

// Its absolute error is a few 1e-7: what counts in a logit. A quotient by infinity is 0.
template <class T, class A>
__device__ A tanh_for(A x) {
  if constexpr (std::is_same_v<T, bf16>)
    return 1.0f - __fdividef(2.0f, __expf(2.0f * x) + 1.0f);
  else
    return tanh_of(x);
}

// Running sum of exp(s - top), joined in a fixed order.
template <class A>
struct Softmax {
  A top, sum, total;  // total: plain sum of s, for smoothing

  __device__ void join(const Softmax& o) {
    const A high = top > o.top ? top : o.top;
    sum = sum * exp_of(top - high) + o.sum * exp_of(o.top - high);
    top = high;
    total += o.total;
  }
};

// Joins the threads' parts; every thread gets the result. blockDim.x is a multiple of 32.
template <class A>
__device__ Softmax<A> join_block(Softmax<A> mine) {
  __shared__ A shared[3][33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const auto join_warp = [](Softmax<A> s) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
      s.join({__shfl_xor_sync(~0u, s.top, d), __shfl_xor_sync(~0u, s.sum, d), __shfl_xor_sync(~0u, s.total, d)});
    return s;
  };
  mine = join_warp(mine);
  if (lane == 0) {
    shared[0][warp] = mine.top;
    shared[1][warp] = mine.sum;
    shared[2][warp] = mine.total;
  }
  __syncthreads();
  if (warp == 0) {
    const bool have = lane < warps;
    const Softmax<A> s = join_warp(Softmax<A>{have ? shared[0][lane] : std::numeric_limits<A>::lowest(),
                                              have ? shared[1][lane] : A(0), have ? shared[2][lane] : A(0)});
    __syncwarp();
    if (lane == 0) {
      shared[0][32] = s.top;
      shared[1][32] = s.sum;
      shared[2][32] = s.total;
    }
  }
  __syncthreads();
  return {shared[0][32], shared[1][32], shared[2][32]};
}

struct Settings {
  int64_t v, valid, ignore;  // columns of a row here, and those that are not padding
  int64_t first, whole;      // the first one's place among all valid columns, and how many those are
  double smoothing, z_loss, cap;
};

constexpr int kMaxRowThreads = 512;  // of a block, for long rows
constexpr int kRowBlocks = 3;        // of them on a multiprocessor: while one waits for its row, others compute

// A logit as the loss sees it. kCapped is a compile-time value, so that without a cap nothing is there.
template <bool kCapped, class T, class A>
__device__ A seen(T x, A cap, A inverse_cap) {
  if constexpr (kCapped)
    return cap * tanh_for<T>(static_cast<A>(x) * inverse_cap);
  else
    return static_cast<A>(x);
}

// Each thread writes what it alone has read, so ds may be s. Ignored rows and padding get 0, a bad target NaN.
template <class T, class A, int V, bool kCapped>
__device__ void gradient_row(T* ds, const T* s, int64_t y, A lse, A factor, const Settings& o) {
  const bool ignored = y == o.ignore, bad = !ignored && (y < 0 || y >= o.whole);
  const A of_p = bad ? std::numeric_limits<A>::quiet_NaN() : factor * (A(1) + A(2 * o.z_loss) * lse);
  const A smooth = factor * A(o.smoothing / static_cast<double>(o.whole)), hit = factor * A(1 - o.smoothing);
  const A cap = A(o.cap), inverse_cap = kCapped ? A(1 / o.cap) : A(0);
  const int v = static_cast<int>(o.v), valid = static_cast<int>(o.valid), stride = static_cast<int>(blockDim.x) * V;
  const int target = ignored || y < o.first || y >= o.first + o.valid ? -V : static_cast<int>(y - o.first);
  const ShiftedExp<T, A> exp_minus_lse(lse);
  const auto one = [&](Pack<T, V> p, int i) {
#pragma unroll
    for (int q = 0; q < V; ++q) {
      const A s_q = seen<kCapped>(p.at[q], cap, inverse_cap);
      A d = of_p * exp_minus_lse(s_q) - smooth;
      if (i + q == target) d -= hit;
      if constexpr (kCapped) d *= A(1) - s_q * inverse_cap * (s_q * inverse_cap);
      p.at[q] = static_cast<T>(d);
    }
    if (i + V > valid && !bad)
      for (int q = 0; q < V; ++q)
        if (i + q >= valid) p.at[q] = T(0.0f);
    *reinterpret_cast<Pack<T, V>*>(ds + i) = p;
  };
  int i = static_cast<int>(threadIdx.x) * V;
  if (ignored) {
    for (; i < v; i += stride) *reinterpret_cast<Pack<T, V>*>(ds + i) = Pack<T, V>{};
    return;
  }
  for (; i + stride < v; i += 2 * stride) {  // two reads in flight
    const Pack<T, V> a = *reinterpret_cast<const Pack<T, V>*>(s + i);
    const Pack<T, V> b = *reinterpret_cast<const Pack<T, V>*>(s + i + stride);
    one(a, i);
    one(b, i + stride);
  }
  if (i < v) one(*reinterpret_cast<const Pack<T, V>*>(s + i), i);
}

// Of the whole block over one row; every thread gets it.
template <bool kCapped, int V, class T, class A = accum_t<T>>
__device__ Softmax<A> softmax_of_row(const T* s, A cap, A inverse_cap, const Settings& o) {
  Softmax<A> mine{std::numeric_limits<A>::lowest(), A(0), A(0)};
  const int valid = static_cast<int>(o.valid), whole = valid / V * V, stride = static_cast<int>(blockDim.x) * V;
  const bool smoothing = o.smoothing != 0.0;
  const auto absorb = [&]<int N>(const Pack<T, N>& p) {
    A x[N], high = mine.top;
#pragma unroll
    for (int q = 0; q < N; ++q) {
      x[q] = seen<kCapped>(p.at[q], cap, inverse_cap);
      high = x[q] > high ? x[q] : high;
    }
    if (high > mine.top) {
      mine.sum *= exp_for<T>(mine.top - high);
      mine.top = high;
    }
    const ShiftedExp<T, A> exp_minus_top(high);
#pragma unroll
    for (int q = 0; q < N; ++q) mine.sum += exp_minus_top(x[q]);
    if (smoothing)
#pragma unroll
      for (int q = 0; q < N; ++q) mine.total += x[q];
  };
  int i = static_cast<int>(threadIdx.x) * V;
  for (; i + stride < whole; i += 2 * stride) {  // two reads in flight
    const Pack<T, V> a = *reinterpret_cast<const Pack<T, V>*>(s + i);
    const Pack<T, V> b = *reinterpret_cast<const Pack<T, V>*>(s + i + stride);
    absorb(a);
    absorb(b);
  }
  if (i < whole) absorb(*reinterpret_cast<const Pack<T, V>*>(s + i));
  if (static_cast<int>(threadIdx.x) < valid - whole) absorb(Pack<T, 1>{s[whole + threadIdx.x]});
  return join_block(mine);
}

template <class A>
__device__ A divided_by_count(A value, const float* count) {
  return value / static_cast<A>(fmaxf(*count, 1.0f));
}

// One block per row; the second pass reads the row from the second-level cache: all rows in flight fit there.
// Bound by memory: read once, with gradients written once.
template <class T, class I, int V, bool kCapped>
__global__ void __launch_bounds__(kMaxRowThreads, sizeof(T) == 8 ? 1 : kRowBlocks)
    rows_kernel(accum_t<T>* rows, accum_t<T>* nll, accum_t<T>* lse_out, T* dlogits, const T* logits, const I* targets,
                const float* count, double scale, Settings o) {
  using A = accum_t<T>;
  const int64_t row = blockIdx.x;
  const T* s = logits + row * o.v;
  const A cap = A(o.cap), inverse_cap = kCapped ? A(1 / o.cap) : A(0);
  const Softmax<A> all = softmax_of_row<kCapped, V>(s, cap, inverse_cap, o);
  const A lse = all.top + log_of(all.sum);
  const auto y = static_cast<int64_t>(targets[row]);
  if (threadIdx.x == 0) {
    A plain = A(0), loss = A(0);
    if (y != o.ignore) {
      const bool good = y >= 0 && y < o.valid;
      plain = good ? lse - seen<kCapped>(s[y], cap, inverse_cap) : std::numeric_limits<A>::quiet_NaN();
      loss = A(1 - o.smoothing) * plain + A(o.z_loss) * lse * lse;
      if (o.smoothing != 0.0) loss += A(o.smoothing) * (lse - all.total / static_cast<A>(o.valid));
    }
    rows[row] = loss;
    nll[row] = plain;
    lse_out[row] = lse;
  }
  if (!dlogits) return;  // the same for the whole grid
  __syncthreads();       // s[y] has been read
  gradient_row<T, A, V, kCapped>(dlogits + row * o.v, s, y, lse, divided_by_count(static_cast<A>(scale), count), o);
}

template <class T, class I, int V, bool kCapped>
__global__ void __launch_bounds__(kMaxRowThreads, sizeof(T) == 8 ? 1 : kRowBlocks)
    gradient_kernel(T* dlogits, const accum_t<T>* dloss, const T* logits, const I* targets,
                                const accum_t<T>* lse, const float* count, Settings o) {
  using A = accum_t<T>;
  const int64_t row = blockIdx.x;
  gradient_row<T, A, V, kCapped>(dlogits + row * o.v, logits + row * o.v, static_cast<int64_t>(targets[row]), lse[row],
                        divided_by_count(*dloss, count), o);
}

// One block per row. Bound by memory: the row is read once.
template <class T, class I, int V, bool kCapped>
__global__ void __launch_bounds__(kMaxRowThreads, sizeof(T) == 8 ? 1 : kRowBlocks)
    partial_kernel(accum_t<T>* top, accum_t<T>* sums, const T* logits, const I* targets, Settings o) {
  using A = accum_t<T>;
  const int64_t row = blockIdx.x, t = gridDim.x;
  const T* s = logits + row * o.v;
  const A cap = A(o.cap), inverse_cap = kCapped ? A(1 / o.cap) : A(0);
  const Softmax<A> all = softmax_of_row<kCapped, V>(s, cap, inverse_cap, o);
  if (threadIdx.x != 0) return;
  const int64_t y = static_cast<int64_t>(targets[row]) - o.first;
  top[row] = all.top;
  sums[row] = all.sum;
  sums[t + row] = y >= 0 && y < o.valid ? seen<kCapped>(s[y], cap, inverse_cap) : A(0);
  sums[2 * t + row] = all.total;
}

template <class A>
__global__ void rescale_kernel(A* sums, const A* from, const A* to, int64_t t) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < t) sums[i] *= exp_of(from[i] - to[i]);
}

// One thread per row, from all members' sums: a bad target gives NaN.
template <class A, class I>
__global__ void finish_kernel(A* rows, A* nll, A* lse_out, const A* top, const A* sums, const I* targets, int64_t t,
                              Settings o) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= t) return;
  const A lse = top[i] + log_of(sums[i]);
  const auto y = static_cast<int64_t>(targets[i]);
  A plain = A(0), loss = A(0);
  if (y != o.ignore) {
    plain = y >= 0 && y < o.whole ? lse - sums[t + i] : std::numeric_limits<A>::quiet_NaN();
    loss = A(1 - o.smoothing) * plain + A(o.z_loss) * lse * lse;
    if (o.smoothing != 0.0) loss += A(o.smoothing) * (lse - sums[2 * t + i] / static_cast<A>(o.whole));
  }
  rows[i] = loss;
  nll[i] = plain;
  lse_out[i] = lse;
}

// Sum over the one block of kSumThreads threads, in a fixed order; thread 0 gets it.
constexpr int kSumThreads = 1024;
template <class A>
__device__ A sum_block(A value) {
  __shared__ A shared[kSumThreads];
  shared[threadIdx.x] = value;
  for (int d = kSumThreads / 2; d > 0; d /= 2) {
    __syncthreads();
    if (threadIdx.x < d) shared[threadIdx.x] += shared[threadIdx.x + d];
  }
  return shared[0];
}

template <class A>
__global__ void reduce_kernel(A* out, const A* rows, const float* count, double scale, int64_t n) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += kSumThreads) sum += static_cast<double>(rows[i]);
  sum = sum_block(sum);
  if (threadIdx.x == 0) *out = static_cast<A>(scale * sum / (count ? static_cast<double>(fmaxf(*count, 1.0f)) : 1.0));
}

template <class I>
__global__ void count_kernel(float* count, const I* targets, int64_t n, int64_t ignore) {
  int64_t kept = 0;
  for (int64_t i = threadIdx.x; i < n; i += kSumThreads) kept += static_cast<int64_t>(targets[i]) != ignore;
  kept = sum_block(kept);
  if (threadIdx.x == 0) *count = static_cast<float>(kept);
}

// A factor of 1, the usual case, costs one read.
template <class T>
__global__ void scale_kernel(T* t, const accum_t<T>* factor, bool must_be_one, int64_t n) {
  using A = accum_t<T>;
  A f = *factor;
  if (f == A(1)) return;
  if (must_be_one) f = std::numeric_limits<A>::quiet_NaN();
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += stride)
    t[i] = static_cast<T>(static_cast<A>(t[i]) * f);
}

// Dtypes, vector width and the cap's presence as compile-time values: 16-byte accesses when every row begins on such
// a boundary.
template <class F>
void visit(const Tensor& logits, const Tensor& dlogits, const Tensor& targets, double cap, F&& f) {
  visit_float(logits.dtype(), [&]<class T>() {
    visit_index(targets.dtype(), [&]<class I>() {
      constexpr int kWidth = 16 / sizeof(T);
      const bool wide = logits.size(1) % kWidth == 0 && aligned(logits, dlogits);
      if (cap > 0)
        wide ? f.template operator()<T, I, kWidth, true>() : f.template operator()<T, I, 1, true>();
      else
        wide ? f.template operator()<T, I, kWidth, false>() : f.template operator()<T, I, 1, false>();
    });
  });
}

Settings settings_of(int64_t v, VocabularyColumns c, const CrossEntropyOptions& o) {
  return {v, c.valid, o.ignore_index, c.first, c.whole, o.label_smoothing, o.z_loss, o.logit_cap};
}

LaunchConfig config_of(const Tensor& logits) {
  const int64_t v = logits.size(1);
  return {.grid = logits.size(0), .block = v >= 8192 ? kMaxRowThreads : v >= 1024 ? 256 : 64,
          .stream = current_stream(logits.device())};
}

}  // namespace

void cross_entropy_rows(Tensor& rows, Tensor& nll, Tensor& lse, Tensor& dlogits, const Tensor& logits,
                        const Tensor& targets, const Tensor& count, double scale, int64_t valid,
                        const CrossEntropyOptions& options) {
  visit(logits, dlogits, targets, options.logit_cap, [&]<class T, class I, int V, bool kCapped>() {
    using A = accum_t<T>;
    launch(rows_kernel<T, I, V, kCapped>, config_of(logits), rows.data<A>(), nll.data<A>(), lse.data<A>(),
           dlogits.defined() ? dlogits.data<T>() : nullptr, logits.data<T>(), targets.data<I>(), count.data<float>(),
           scale, settings_of(logits.size(1), {0, valid, valid}, options));
  });
}

void cross_entropy_gradient(Tensor& dlogits, const Tensor& dloss, const Tensor& logits, const Tensor& targets,
                            const Tensor& lse, const Tensor& count, VocabularyColumns columns,
                            const CrossEntropyOptions& options) {
  visit(logits, dlogits, targets, options.logit_cap, [&]<class T, class I, int V, bool kCapped>() {
    using A = accum_t<T>;
    launch(gradient_kernel<T, I, V, kCapped>, config_of(logits), dlogits.data<T>(), dloss.data<A>(), logits.data<T>(),
           targets.data<I>(), lse.data<A>(), count.data<float>(), settings_of(logits.size(1), columns, options));
  });
}

void cross_entropy_partial(Tensor& top, Tensor& sums, const Tensor& logits, const Tensor& targets,
                           VocabularyColumns columns, const CrossEntropyOptions& options) {
  visit(logits, {}, targets, options.logit_cap, [&]<class T, class I, int V, bool kCapped>() {
    using A = accum_t<T>;
    launch(partial_kernel<T, I, V, kCapped>, config_of(logits), top.data<A>(), sums.data<A>(), logits.data<T>(),
           targets.data<I>(), settings_of(logits.size(1), columns, options));
  });
}

void cross_entropy_rescale(Tensor& sums, const Tensor& from, const Tensor& to) {
  const int64_t t = from.numel();
  visit_float(sums.dtype(), [&]<class A>() {
    if constexpr (!std::is_same_v<A, bf16>)  // sums are never bf16
      launch(rescale_kernel<A>, {.grid = ceil_div(t, 256), .block = 256, .stream = current_stream(sums.device())},
             sums.data<A>(), from.data<A>(), to.data<A>(), t);
  });
}

void cross_entropy_finish(Tensor& rows, Tensor& nll, Tensor& lse, const Tensor& top, const Tensor& sums,
                          const Tensor& targets, int64_t valid, const CrossEntropyOptions& options) {
  const int64_t t = rows.numel();
  visit_float(rows.dtype(), [&]<class A>() {
    if constexpr (!std::is_same_v<A, bf16>)
      visit_index(targets.dtype(), [&]<class I>() {
        launch(finish_kernel<A, I>, {.grid = ceil_div(t, 256), .block = 256, .stream = current_stream(rows.device())},
               rows.data<A>(), nll.data<A>(), lse.data<A>(), top.data<A>(), sums.data<A>(), targets.data<I>(), t,
               settings_of(0, {0, valid, valid}, options));
      });
  });
}

void cross_entropy_reduce(Tensor& out, const Tensor& rows, const Tensor& count, double scale) {
  visit_float(rows.dtype(), [&]<class A>() {
    if constexpr (!std::is_same_v<A, bf16>)  // sums are never bf16
      launch(reduce_kernel<A>, {.grid = 1, .block = kSumThreads, .stream = current_stream(rows.device())},
             out.data<A>(), rows.data<A>(), count.defined() ? count.data<float>() : nullptr, scale, rows.numel());
  });
}

void cross_entropy_count(Tensor& count, const Tensor& targets, int64_t, int64_t ignore_index) {
  visit_index(targets.dtype(), [&]<class I>() {
    launch(count_kernel<I>, {.grid = 1, .block = kSumThreads, .stream = current_stream(targets.device())},
           count.data<float>(), targets.data<I>(), targets.numel(), ignore_index);
  });
}

void scale_by(Tensor& t, const Tensor& factor, bool must_be_one) {
  visit_float(t.dtype(), [&]<class T>() {
    launch(scale_kernel<T>,
           {.grid = std::min<int64_t>(ceil_div(t.numel(), 256), 132 * 16), .stream = current_stream(t.device())},
           t.data<T>(), factor.data<accum_t<T>>(), must_be_one, t.numel());
  });
}

}  // namespace krait::kernels::cuda

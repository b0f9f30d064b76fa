#include "kernels/s4_step.h"

#include "kernels/complex.h"
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/aligned.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/step_known.h"
#include "kernels/cuda/step_values.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kMaxStates = 128;

template <class T, class A = accum_t<T>>
struct StepJob {
  T* y;
  Complex<A>* x;
  const T* u;
  const Complex<A>*a, *b, *c, *m, *q;
  const A* d;  // may be null
  int64_t rows;
  int channels, inputs, n, rank;
};

struct Plain {
  template <class A>
  static __device__ __forceinline__ ValueAndSlope<A> at(A x) {
    return {x, A(1)};
  }
};

/// V complex values side by side, read and written as one.
template <class A, int V>
struct alignas(2 * V * sizeof(A)) Values {
  Complex<A> v[V];
};

// kLanes lanes: one channel of kRows rows, J times V states each, so that a channel's system is read once for several rows. Bound by
// reading and writing the states at many rows, else by latency.
template <class T, class F, int kLanes, int V, int J, int kRows>
__global__ void __launch_bounds__(kThreads) s4_step_kernel(const StepJob<T> j) {
  using A = accum_t<T>;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanes;
  const bool real = at < j.channels;
  const int64_t channel = real ? at : 0, row0 = int64_t{blockIdx.y} * kRows;
  take_over();

  // Each lane's states: V at lane V, V more kLanes V further on, ...
  using Some = Values<A, V>;
  Some a[J], b[J], c[J], x[kRows][J], next[kRows][J];
  A u[kRows];
  const auto holds = [&](int i) { return real && (lane + i * kLanes) * V < j.n; };
  const auto some = [&](const Complex<A>* from, int64_t first, int i) {
    return holds(i) ? *reinterpret_cast<const Some*>(from + first * j.n + (lane + i * kLanes) * V) : Some{};
  };
  const auto state = [&](int r, int i) {
    return reinterpret_cast<Some*>(j.x + ((row0 + r) * j.channels + channel) * j.n + (lane + i * kLanes) * V);
  };
#pragma unroll
  for (int i = 0; i < J; ++i) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) x[r][i] = holds(i) && row0 + r < j.rows ? *state(r, i) : Some{};
    a[i] = some(j.a, channel, i);
    b[i] = some(j.b, channel, i);
    c[i] = some(j.c, channel, i);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    u[r] = row0 + r < j.rows ? static_cast<A>(j.u[(row0 + r) * j.inputs + channel % j.inputs]) : A(0);
  const A skip = j.d != nullptr ? j.d[channel] : A(0);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int i = 0; i < J; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v) next[r][i].v[v] = a[i].v[v] * x[r][i].v[v] + u[r] * b[i].v[v];
  for (int k = 0; k < j.rank; ++k) {
    Some m[J], q[J];
#pragma unroll
    for (int i = 0; i < J; ++i) {
      m[i] = some(j.m, channel * j.rank + k, i);
      q[i] = some(j.q, channel * j.rank + k, i);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      A dot = A(0);
#pragma unroll
      for (int i = 0; i < J; ++i)
#pragma unroll
        for (int v = 0; v < V; ++v) dot += (q[i].v[v] * x[r][i].v[v]).re;
      dot = 2 * sum_lanes<kLanes>(dot);
#pragma unroll
      for (int i = 0; i < J; ++i)
#pragma unroll
        for (int v = 0; v < V; ++v) next[r][i].v[v] = next[r][i].v[v] - dot * m[i].v[v];
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    A sum = A(0);
#pragma unroll
    for (int i = 0; i < J; ++i) {
#pragma unroll
      for (int v = 0; v < V; ++v) sum += (c[i].v[v] * next[r][i].v[v]).re;
      if (holds(i) && row0 + r < j.rows) *state(r, i) = next[r][i];
    }
    sum = 2 * sum_lanes<kLanes>(sum) + skip * u[r];
    if (real && lane == r && row0 + r < j.rows)
      j.y[(row0 + r) * j.channels + channel] = static_cast<T>(F::at(static_cast<A>(static_cast<T>(sum))).value);
  }
}

// f.operator()<kLanes, V, J>(): lanes of a channel, states side by side, and how often.
template <class F>
void visit_states(int64_t n, bool pairs, F&& f) {
  if (!pairs || n % 2 != 0) {
    if (n <= 8) return f.template operator()<8, 1, 1>();
    if (n <= 32) return f.template operator()<32, 1, 1>();
    if (n <= 64) return f.template operator()<32, 1, 2>();
    return f.template operator()<32, 1, 4>();
  }
  if (n <= 16) return f.template operator()<8, 2, 1>();
  if (n <= 32) return f.template operator()<16, 2, 1>();
  if (n <= 64) return f.template operator()<32, 2, 1>();
  f.template operator()<32, 2, 2>();
}

}  // namespace

void s4_step(bool& done, Tensor& y, Tensor& x, const Tensor& u, const S4System& s, std::optional<Activation> f) {
  const int64_t rows = u.size(0), channels = s.A.size(0), n = s.A.size(1);
  done = n <= kMaxStates && channels < (int64_t{1} << 30) && (!f || *f == Activation::gelu_erf || *f == Activation::silu);
  if (!done) return;
  visit_float(u.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const auto values = [](const Tensor& t) { return t.defined() ? reinterpret_cast<const Complex<A>*>(t.data<A>()) : nullptr; };
    const StepJob<T> job{y.data<T>(), reinterpret_cast<Complex<A>*>(x.data<A>()), u.data<T>(), values(s.A), values(s.B), values(s.C),
                         values(s.M), values(s.Q), pointer_or_null<A>(s.D), rows, static_cast<int>(channels),
                         static_cast<int>(u.size(1)), static_cast<int>(n), s.M.defined() ? static_cast<int>(s.M.size(1)) : 0};
    visit_states(n, aligned(s.A, s.B, s.C, s.M, s.Q, x), [&]<int kLanes, int V, int J>() {
      const auto run = [&]<class Act, int kRows>() {
        launch_overlapped(s4_step_kernel<T, Act, kLanes, V, J, kRows>,
                          {.grid = ceil_div(channels * kLanes, kThreads), .grid_y = ceil_div(rows, kRows), .block = kThreads,
                           .stream = current_stream(u.device())},
                          job);
      };
      const auto with = [&]<class Act>() {
        if (rows == 1) return run.template operator()<Act, 1>();
        run.template operator()<Act, 2>();  // 4 are slower
      };
      if (!f) return with.template operator()<Plain>();
      if (*f == Activation::silu) return with.template operator()<Silu>();
      with.template operator()<GeluErf>();
    });
  });
  known_to_step(y);
}

}  // namespace krait::kernels::cuda

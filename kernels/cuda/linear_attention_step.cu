#include "kernels/linear_attention_step.h"

#include <cmath>

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/aligned.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/step_known.h"
#include "kernels/cuda/step_values.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 384;
constexpr int kMaxWidth = 1024;  // of a head
constexpr int kAhead = 3;        // rows of the state that a group of lanes has in flight

template <class T, class A = accum_t<T>>
struct StepJob {
  T* y;
  A* S;
  const T *qkv, *u, *gate_weight;  // gate_weight may be null
  const A* gate_bias;
  A eps, scale;
  int h, d, m;
  bool elu1;
};

// A block: one head of one row. kLanes lanes share a row of the state, V values at a time. Bound by reading and writing the
// state at many rows, else by latency.
template <class T, int kLanes, int V>
__global__ void __launch_bounds__(kThreads) linear_attention_step_kernel(const StepJob<T> j) {
  using A = accum_t<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ A gate[kThreads / 32];
  A* const q = reinterpret_cast<A*>(shared);  // phi(q), phi(k), v with z's 1, sums: (d + V) each
  A* const k = q + (j.d + V) / V * V;
  A* const v = k + (j.d + V) / V * V;
  A* const sums = v + (j.d + V) / V * V;
  const int t = static_cast<int>(threadIdx.x), head = static_cast<int>(blockIdx.x), rows = j.d + (j.elu1 ? 1 : 0);
  const int64_t row = blockIdx.y;
  take_over();
  const T* const from = j.qkv + (row * 3 * j.h + head) * j.d;
  const int64_t third = int64_t{j.h} * j.d;
  const auto feature = [&](A x) { return !j.elu1 ? x : x > A(0) ? x + A(1) : exp_of(x); };
  A* const S = j.S + (row * j.h + head) * rows * j.d;
  const int lane = t % kLanes, group = t / kLanes, groups = kThreads / kLanes;
  A s[kAhead][V];
  const auto load = [&](int first, int c) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (const int r = first + i * groups; r < rows && c < j.d) load_values(s[i], S + int64_t{r} * j.d + c);
  };
  load(group, lane * V);
  for (int i = t; i < j.d; i += kThreads) {
    q[i] = feature(static_cast<A>(from[i])) * j.scale;
    k[i] = feature(static_cast<A>(from[third + i]));
    v[i] = static_cast<A>(from[2 * third + i]);
  }
  if (t == 0) v[j.d] = A(1);
  if (j.gate_weight != nullptr) {
    A sum = A(0);
    for (int i = t; i < j.m; i += kThreads)
      sum += static_cast<A>(j.u[row * j.m + i]) * static_cast<A>(j.gate_weight[int64_t{head} * j.m + i]);
    sum = sum_lanes<32>(sum);
    if (t % 32 == 0) gate[t / 32] = sum;
  }
  __syncthreads();
  A keep = A(1);
  if (j.gate_weight != nullptr) {
    A logit = j.gate_bias[head];
#pragma unroll
    for (int i = 0; i < kThreads / 32; ++i) logit += gate[i];
    keep = A(1) / (A(1) + exp_of(-logit));
  }
  for (int first = group; first < rows + group; first += groups * kAhead) {  // all lanes of a warp turn alike
    A sum[kAhead] = {};
    for (int c = lane * V; c < j.d; c += kLanes * V) {
      if (first != group || c != lane * V) load(first, c);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int r = first + i * groups;
        if (r >= rows) continue;
#pragma unroll
        for (int e = 0; e < V; ++e) {
          s[i][e] = keep * s[i][e] + v[r] * k[c + e];
          sum[i] += s[i][e] * q[c + e];
        }
        store_values(S + int64_t{r} * j.d + c, s[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      sum[i] = sum_lanes<kLanes>(sum[i]);
      if (const int r = first + i * groups; lane == 0 && r < rows) sums[r] = sum[i];
    }
  }
  __syncthreads();
  const A divisor = j.elu1 ? sums[j.d] + j.eps : A(1);
  T* const y = j.y + (row * j.h + head) * j.d;
  for (int i = t; i < j.d; i += kThreads) y[i] = static_cast<T>(sums[i] / divisor);
}

// f.operator()<kLanes, V>(), for a width of d.
template <class F>
void visit_widths(int64_t d, bool whole, F&& f) {
  if (!whole || d % 4 != 0) return f.template operator()<32, 1>();
  if (d % 128 == 0) return f.template operator()<32, 4>();
  if (d % 64 == 0) return f.template operator()<16, 4>();
  f.template operator()<8, 4>();
}

}  // namespace

void linear_attention_step(bool& done, Tensor& y, Tensor& S, const Tensor& qkv, const LinearAttentionStep& step) {
  const int64_t b = qkv.size(0), h = qkv.size(2), d = qkv.size(3);
  done = d <= kMaxWidth && b < 65536 && h < (1 << 30);
  if (!done) return;
  visit_float(qkv.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const StepJob<T> job{y.data<T>(), S.data<A>(), qkv.data<T>(), pointer_or_null<T>(step.u), pointer_or_null<T>(step.gate_weight),
                         pointer_or_null<A>(step.gate_bias), static_cast<A>(step.eps),
                         step.elu1 ? A(1) : static_cast<A>(1.0 / std::sqrt(static_cast<double>(d))), static_cast<int>(h),
                         static_cast<int>(d), step.u.defined() ? static_cast<int>(step.u.size(1)) : 0, step.elu1};
    visit_widths(d, aligned(S), [&]<int kLanes, int V>() {
      launch_overlapped(linear_attention_step_kernel<T, kLanes, V>,
                        {.grid = h, .grid_y = b, .block = kThreads, .shared = 4 * ((d + V) / V * V) * static_cast<int64_t>(sizeof(A)),
                         .stream = current_stream(qkv.device())},
                        job);
    });
  });
  known_to_step(y);
}

}  // namespace krait::kernels::cuda

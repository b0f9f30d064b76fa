#pragma once
#include "core/cuda/launch.cuh"
#include "kernels/cuda/exp2.cuh"
#include "kernels/selective_scan.h"

// What the selective scan's kernels share. A: dtype of sums. A thread owns one channel and kStates states of it; a
// block kChannels channels and as many groups of states as n needs (threadIdx.x = group kChannels + channel). Places
// past l, e and n are filled up so that they change nothing: delta = x = g = 0 and B = C = 0.
namespace krait::kernels::cuda {

template <class T, class A = accum_t<T>>
struct ScanView {
  const T *x, *dt, *b, *c, *z;              // z may be null
  const A *a, *d, *bias;                    // d, bias may be null
  const int32_t* segments;                  // may be null
  int64_t l, e;
  int64_t x_batch, x_row, dt_batch, dt_row, b_batch, b_row, c_batch, c_row, z_batch, z_row;
  int n;
  bool softplus;

  // Whether a document begins at t, so that the state before it does not count.
  __device__ bool begins(int64_t row, int64_t t) const {
    return segments != nullptr && t > 0 && t < l && segments[row * l + t] != segments[row * l + t - 1];
  }
};

template <class T>
const T* scan_pointer(const Tensor& t) {
  return t.defined() ? t.data<T>() : nullptr;
}

template <class T>
ScanView<T> scan_view(const SelectiveScanInputs& in) {
  using A = accum_t<T>;
  ScanView<T> v{};
  v.x = in.x.data<T>();
  v.dt = in.dt.data<T>();
  v.b = in.B.data<T>();
  v.c = in.C.data<T>();
  v.z = scan_pointer<T>(in.z);
  v.a = in.A.data<A>();
  v.d = scan_pointer<A>(in.D);
  v.bias = scan_pointer<A>(in.dt_bias);
  v.segments = scan_pointer<int32_t>(in.segments);
  v.l = in.x.size(1);
  v.e = in.x.size(2);
  v.x_batch = in.x.stride(0);
  v.x_row = in.x.stride(1);
  v.dt_batch = in.dt.stride(0);
  v.dt_row = in.dt.stride(1);
  v.b_batch = in.B.stride(0);
  v.b_row = in.B.stride(1);
  v.c_batch = in.C.stride(0);
  v.c_row = in.C.stride(1);
  v.z_batch = in.z.defined() ? in.z.stride(0) : 0;
  v.z_row = in.z.defined() ? in.z.stride(1) : 0;
  v.n = static_cast<int>(in.A.size(1));
  v.softplus = in.softplus;
  return v;
}

__device__ __forceinline__ float scan_exp2(float x) { return exp2_fast(x); }
__device__ __forceinline__ double scan_exp2(double x) { return exp2(x); }

__device__ __forceinline__ float scan_sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ double scan_sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
__device__ __forceinline__ float scan_softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }
__device__ __forceinline__ double scan_softplus(double x) { return fmax(x, 0.0) + log1p(exp(-fabs(x))); }

// silu(-infinity) = 0, not -infinity times 0.
template <class A>
__device__ __forceinline__ A scan_silu(A x) {
  const A c = x < A(-110) ? A(-110) : x;
  return c * scan_sigmoid(c);
}

inline constexpr double kLog2E = 1.44269504088896340736;

// Rows [t0, t0 + kSteps) of B or C of one batch row into shared memory (kSteps, width), width >= n.
template <int kSteps, class T, class A>
__device__ __forceinline__ void load_state_rows(A* to, const T* from, int64_t row_stride, int64_t t0, int64_t l, int n,
                                                int width) {
  for (int i = static_cast<int>(threadIdx.x); i < kSteps * width; i += static_cast<int>(blockDim.x)) {
    const int64_t t = t0 + i / width;
    const int s = i % width;
    to[i] = t < l && s < n ? static_cast<A>(from[t * row_stride + s]) : A(0);
  }
}

// The states of chunks of `length` positions, one after the other. Forward: states[k] holds the state that chunk k makes of 0 and becomes
// the state before it (first: h0; the last chunk's is not read). Reverse: states[k] holds what chunk k sends back
// of 0 and becomes what it receives (first: the final state's gradient); what chunk 0 sends back goes to `out`.
// states (b, chunks, n, e); deltas (b, chunks, e) sums of delta; initial and out (b, e, n) may be null.
template <bool kReverse, class T, class A = accum_t<T>>
__global__ void scan_chunks_kernel(A* __restrict__ states, A* __restrict__ out, const A* __restrict__ deltas,
                                   const A* __restrict__ initial, const ScanView<T> in, int64_t chunks, int64_t length) {
  const int64_t channel = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int i = static_cast<int>(blockIdx.y);
  const int64_t row = blockIdx.z, e = in.e, n = in.n;
  if (channel >= e) return;
  const A a = in.a[channel * n + i] * static_cast<A>(kLog2E);
  A h = initial == nullptr ? A(0) : initial[(row * e + channel) * n + i];
  for (int64_t step = 0; step < chunks; ++step) {
    const int64_t k = kReverse ? chunks - 1 - step : step;
    A* place = states + ((row * chunks + k) * n + i) * e + channel;
    const bool last = !kReverse && k == chunks - 1;
    const A own = last ? A(0) : *place;
    *place = h;
    if (last) return;
    A decay = scan_exp2(a * deltas[(row * chunks + k) * e + channel]);
    if (in.segments != nullptr) {
      const int32_t* s = in.segments + row * in.l;
      const int64_t t0 = k * length, t1 = t0 + length < in.l ? t0 + length : in.l;
      if (s[t1 - 1] != s[t0 > 0 ? t0 - 1 : 0]) decay = A(0);
    }
    h = decay * h + own;
  }
  if (out != nullptr) out[(row * e + channel) * n + i] = h;
}

// The gradients of parameters and of B and C from parts: da (..., n, e), rows (parts, 2, e) of dD and ddt_bias, bc
// (blocks of channels, b, l, 2 n) of dB and dC. In a fixed order.
void sum_scan_parts(SelectiveScanGrad& grad, const Tensor& da, const Tensor& rows, const Tensor& bc);

// bf16 with 16 states: a thread walks along a channel with all its states (selective_scan_walk*.cu).
bool scan_walks(const SelectiveScanInputs& in);
Tensor walk_states(const SelectiveScanInputs& in);
void walk_forward(Tensor& y, Tensor& final_state, Tensor& states, const SelectiveScanInputs& in);
void walk_backward(SelectiveScanGrad& grad, const Tensor& dy, const Tensor& dfinal, const SelectiveScanInputs& in,
                   const Tensor& states);

}  // namespace krait::kernels::cuda

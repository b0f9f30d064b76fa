#include "kernels/cuda/selective_scan.cuh"

// What a piece of a sequence makes of a state, and what its outputs send back to it, in two launches: what each chunk of
// kScanChunk positions makes of zero, with its sum of time steps, and the chunks one after the other. Half the
// exponentials of the forward pass and no output.
namespace krait::kernels::cuda {

namespace {

constexpr int kSteps = 16;  // positions per tile of B or C in shared memory
constexpr int kAhead = 8;   // positions whose inputs are loaded together
constexpr int kChannels = 128, kStates = 16;

// Forward: h = exp(delta A) h + delta B x from the chunk's first position on. Reverse: r = exp(delta A) (r + g C) from
// its last. One thread a channel and kStates states (blockIdx.z). states (b, chunks, n, e), deltas (b, chunks, e).
template <bool kReverse, class T, class A = accum_t<T>>
__global__ void __launch_bounds__(kChannels)
    scan_own_kernel(A* __restrict__ states, A* __restrict__ deltas, const T* __restrict__ dy, int64_t dy_batch,
                    int64_t dy_row, const ScanView<T> in, int64_t chunks) {
  __shared__ A rows[kSteps * kStates];
  const int64_t row = int64_t{blockIdx.x} / chunks, k = int64_t{blockIdx.x} % chunks;
  const int64_t channel = int64_t{blockIdx.y} * kChannels + threadIdx.x;
  const bool active = channel < in.e;
  const int64_t t0 = k * kScanChunk, t1 = t0 + kScanChunk < in.l ? t0 + kScanChunk : in.l, count = t1 - t0;
  const int first = static_cast<int>(blockIdx.z) * kStates, n = in.n - first < kStates ? in.n - first : kStates;
  const auto position = [&](int64_t step) { return kReverse ? t1 - 1 - step : t0 + step; };

  A a[kStates], h[kStates];
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    a[i] = active && i < n ? in.a[channel * in.n + first + i] * static_cast<A>(kLog2E) : A(0);
    h[i] = 0;
  }
  const A bias = active && in.bias != nullptr ? in.bias[channel] : A(0);
  const T* x = kReverse ? dy + row * dy_batch + channel : in.x + row * in.x_batch + channel;
  const T* z = kReverse && in.z != nullptr ? in.z + row * in.z_batch + channel : nullptr;
  const T* dt = in.dt + row * in.dt_batch + channel;
  const T* weights = kReverse ? in.c + row * in.c_batch + first : in.b + row * in.b_batch + first;
  const int64_t x_row = kReverse ? dy_row : in.x_row, weight_row = kReverse ? in.c_row : in.b_row;
  A sum = 0;

  for (int64_t tile = 0; tile < count; tile += kSteps) {
    __syncthreads();
    for (int at = static_cast<int>(threadIdx.x); at < kSteps * kStates; at += kChannels) {
      const int64_t step = tile + at / kStates;
      const int i = at % kStates;
      rows[at] = step < count && i < n ? static_cast<A>(weights[position(step) * weight_row + i]) : A(0);
    }
    __syncthreads();
    for (int s0 = 0; s0 < kSteps && tile + s0 < count; s0 += kAhead) {
      A delta[kAhead], value[kAhead];
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        const int64_t step = tile + s0 + s, t = position(step);
        const bool real = active && step < count;
        delta[s] = real ? static_cast<A>(dt[t * in.dt_row]) : A(0);
        value[s] = real ? static_cast<A>(x[t * x_row]) : A(0);
        if (real && z != nullptr) value[s] *= scan_silu(static_cast<A>(z[t * in.z_row]));
      }
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        const int64_t step = tile + s0 + s;
        const bool real = active && step < count;
        delta[s] += bias;
        if (in.softplus) delta[s] = scan_softplus(delta[s]);
        if (!real) delta[s] = 0;
        sum += delta[s];
        const bool begins = step < count && in.begins(row, position(step));
        const A* w = rows + (s0 + s) * kStates;
        const A v = kReverse ? value[s] : delta[s] * value[s];
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
          const A decay = scan_exp2(delta[s] * a[i]);
          if constexpr (kReverse) {
            h[i] = begins ? A(0) : decay * (h[i] + v * w[i]);
          } else {
            h[i] = (begins ? A(0) : decay * h[i]) + v * w[i];
          }
        }
      }
    }
  }

  if (!active) return;
  for (int i = 0; i < kStates; ++i)
    if (i < n) states[((row * chunks + k) * in.n + first + i) * in.e + channel] = h[i];
  if (blockIdx.z == 0) deltas[(row * chunks + k) * in.e + channel] = sum;
}

// out (b, e, n) and, where wanted, totals (b, e); initial (b, e, n) may be null.
template <bool kReverse, class T, class A = accum_t<T>>
__global__ void scan_fold_kernel(A* __restrict__ out, A* __restrict__ totals, const A* __restrict__ states,
                                 const A* __restrict__ deltas, const A* __restrict__ initial, const ScanView<T> in,
                                 int64_t chunks) {
  const int64_t channel = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int i = static_cast<int>(blockIdx.y);
  const int64_t row = blockIdx.z, e = in.e, n = in.n, place = (row * e + channel) * n + i;
  if (channel >= e) return;
  const A a = in.a[channel * n + i] * static_cast<A>(kLog2E);
  A h = initial == nullptr ? A(0) : initial[place], total = 0;
  for (int64_t step = 0; step < chunks; ++step) {
    const int64_t k = kReverse ? chunks - 1 - step : step;
    const A delta = deltas[(row * chunks + k) * e + channel];
    total += delta;
    A decay = scan_exp2(a * delta);
    if (in.segments != nullptr) {
      const int32_t* s = in.segments + row * in.l;
      const int64_t t0 = k * kScanChunk, t1 = t0 + kScanChunk < in.l ? t0 + kScanChunk : in.l;
      if (s[t1 - 1] != s[t0 > 0 ? t0 - 1 : 0]) decay = A(0);
    }
    h = decay * h + states[((row * chunks + k) * n + i) * e + channel];
  }
  out[place] = h;
  if (totals != nullptr && i == 0) totals[row * e + channel] = total;
}

template <bool kReverse, class T>
void run(Tensor& out, const Tensor& totals, const Tensor& dy, const SelectiveScanInputs& in) {
  using A = accum_t<T>;
  const int64_t b = in.x.size(0), l = in.x.size(1), e = in.x.size(2), n = in.A.size(1), chunks = ceil_div(l, kScanChunk);
  const Device device = in.x.device();
  const Stream stream = current_stream(device);
  const Tensor states = empty({b, chunks, n, e}, dtype_of<A>, device), deltas = empty({b, chunks, e}, dtype_of<A>, device);
  const ScanView<T> view = scan_view<T>(in);
  launch(scan_own_kernel<kReverse, T>,
         {.grid = b * chunks, .grid_y = ceil_div(e, kChannels), .grid_z = ceil_div(n, kStates), .block = kChannels,
          .stream = stream},
         states.data<A>(), deltas.data<A>(), scan_pointer<T>(dy), dy.defined() ? dy.stride(0) : 0,
         dy.defined() ? dy.stride(1) : 0, view, chunks);
  launch(scan_fold_kernel<kReverse, T>,
         {.grid = ceil_div(e, kChannels), .grid_y = n, .grid_z = b, .block = kChannels, .stream = stream},
         out.data<A>(), const_cast<A*>(scan_pointer<A>(totals)), states.data<A>(), deltas.data<A>(),
         kReverse ? nullptr : scan_pointer<A>(in.h0), view, chunks);
}

}  // namespace

void selective_scan_summary(Tensor& state, Tensor& deltas, const SelectiveScanInputs& in) {
  visit_float(in.x.dtype(), [&]<class T>() { run<false, T>(state, deltas, {}, in); });
}

void selective_scan_initial_gradient(Tensor& gradient, const Tensor& dy, const SelectiveScanInputs& in) {
  visit_float(in.x.dtype(), [&]<class T>() { run<true, T>(gradient, {}, dy, in); });
}

}  // namespace krait::kernels::cuda

#include "kernels/cuda/selective_scan.cuh"

// Forward in three launches over chunks of kScanChunk positions: what each chunk makes of a zero state and the sum of
// its time steps, whose exponential is the chunk's decay (chunk k starts from 0, all but the last); the states between
// the chunks (scan_chunks_kernel); the outputs. A single chunk needs the last one only. Bound by the
// exponentials, 2 b l e n, then by memory.
namespace krait::kernels::cuda {

namespace {

constexpr int kSteps = 16;  // positions per tile of B and C in shared memory
constexpr int kAhead = 8;   // positions whose inputs are loaded together

// kOutput: y from the state before the chunk (states, or h0 / 0 where that is null), and from the last chunk the final
// state. Else: the chunk's own state into states and its sum of time steps into deltas.
// Shared: B, C (kSteps, groups kStates), and with more than one group y's parts (groups, kAhead, kChannels).
template <class T, int kStates, int kChannels, bool kOutput, class A = accum_t<T>>
__global__ void __launch_bounds__(kChannels == 32 ? 512 : 128)
    scan_forward_kernel(T* __restrict__ y, A* __restrict__ final_state, A* __restrict__ states,
                        A* __restrict__ deltas, const A* __restrict__ h0, const ScanView<T> in, int64_t chunks,
                        int64_t used_chunks, int groups) {
  extern __shared__ double shared_bytes[];
  const int width = groups * kStates;
  A* b_rows = reinterpret_cast<A*>(shared_bytes);
  A* c_rows = b_rows + kSteps * width;
  A* parts = c_rows + kSteps * width;
  const int lane = static_cast<int>(threadIdx.x) % kChannels, group = static_cast<int>(threadIdx.x) / kChannels;
  const int64_t row = int64_t{blockIdx.x} / used_chunks, k = int64_t{blockIdx.x} % used_chunks;
  const int64_t channel = int64_t{blockIdx.y} * kChannels + lane;
  const bool active = channel < in.e;
  const int64_t t0 = k * kScanChunk, t1 = t0 + kScanChunk < in.l ? t0 + kScanChunk : in.l;
  const int first = group * kStates;

  A a[kStates], h[kStates];
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    const bool real = active && first + i < in.n;
    a[i] = real ? in.a[channel * in.n + first + i] * static_cast<A>(kLog2E) : A(0);
    h[i] = 0;
    if (kOutput && real) {
      if (states != nullptr)
        h[i] = states[((row * chunks + k) * in.n + first + i) * in.e + channel];
      else if (h0 != nullptr)
        h[i] = h0[(row * in.e + channel) * in.n + first + i];
    }
  }
  const A bias = active && in.bias != nullptr ? in.bias[channel] : A(0);
  const A d = active && in.d != nullptr ? in.d[channel] : A(0);
  const T* x = in.x + row * in.x_batch + channel;
  const T* dt = in.dt + row * in.dt_batch + channel;
  A sum = 0;

  for (int64_t tile = t0; tile < t1; tile += kSteps) {
    __syncthreads();
    load_state_rows<kSteps>(b_rows, in.b + row * in.b_batch, in.b_row, tile, t1, in.n, width);
    if (kOutput) load_state_rows<kSteps>(c_rows, in.c + row * in.c_batch, in.c_row, tile, t1, in.n, width);
    __syncthreads();
    for (int s0 = 0; s0 < kSteps && tile + s0 < t1; s0 += kAhead) {
      A delta[kAhead], value[kAhead];
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        const int64_t t = tile + s0 + s;
        const bool real = active && t < t1;
        delta[s] = real ? static_cast<A>(dt[t * in.dt_row]) : A(0);
        value[s] = real ? static_cast<A>(x[t * in.x_row]) : A(0);
      }
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        const int64_t t = tile + s0 + s;
        delta[s] += bias;
        if (in.softplus) delta[s] = scan_softplus(delta[s]);
        if (!active || t >= t1) delta[s] = 0;
        sum += delta[s];
        if (in.begins(row, t)) {
#pragma unroll
          for (int i = 0; i < kStates; ++i) h[i] = 0;
        }
        const A dx = delta[s] * value[s];
        const A* b = b_rows + (s0 + s) * width + first;
        const A* c = c_rows + (s0 + s) * width + first;
        A u = 0;
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
          h[i] = scan_exp2(delta[s] * a[i]) * h[i] + dx * b[i];
          if (kOutput) u += c[i] * h[i];
        }
        if (!kOutput) continue;
        if (groups > 1) {
          parts[(group * kAhead + s) * kChannels + lane] = u;
        } else if (active && t < t1) {
          u += d * value[s];
          if (in.z != nullptr) u *= scan_silu(static_cast<A>(in.z[row * in.z_batch + t * in.z_row + channel]));
          y[(row * in.l + t) * in.e + channel] = static_cast<T>(u);
        }
      }
      if (!kOutput || groups == 1) continue;
      __syncthreads();
      for (int s = group; s < kAhead; s += groups) {
        const int64_t t = tile + s0 + s;
        if (!active || t >= t1) continue;
        A u = d * static_cast<A>(x[t * in.x_row]);
        for (int g = 0; g < groups; ++g) u += parts[(g * kAhead + s) * kChannels + lane];
        if (in.z != nullptr) u *= scan_silu(static_cast<A>(in.z[row * in.z_batch + t * in.z_row + channel]));
        y[(row * in.l + t) * in.e + channel] = static_cast<T>(u);
      }
      __syncthreads();
    }
  }

  if (!active) return;
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    if (first + i >= in.n) continue;
    if (!kOutput)
      states[((row * chunks + k) * in.n + first + i) * in.e + channel] = h[i];
    else if (t1 == in.l)
      final_state[(row * in.e + channel) * in.n + first + i] = h[i];
  }
  if (!kOutput && group == 0) deltas[(row * chunks + k) * in.e + channel] = sum;
}

template <class T, int kStates, int kChannels>
void run_forward(Tensor& y, Tensor& final_state, const Tensor& states, const SelectiveScanInputs& in, int groups) {
  using A = accum_t<T>;
  const int64_t b = in.x.size(0), l = in.x.size(1), e = in.x.size(2), n = in.A.size(1);
  const int64_t chunks = ceil_div(l, kScanChunk);
  const ScanView<T> view = scan_view<T>(in);
  A* saved = states.defined() ? states.data<A>() : nullptr;
  LaunchConfig config{.grid = b * chunks,
                      .grid_y = ceil_div(e, kChannels),
                      .block = kChannels * groups,
                      .shared = static_cast<int64_t>(sizeof(A)) *
                                (2 * kSteps * groups * kStates + (groups > 1 ? groups * kAhead * kChannels : 0)),
                      .stream = current_stream(in.x.device())};
  const A* h0 = scan_pointer<A>(in.h0);
  if (saved != nullptr) {
    const Tensor deltas = empty({b, chunks, e}, dtype_of<A>, in.x.device());
    if (chunks > 1) {
      LaunchConfig own = config;
      own.grid = b * (chunks - 1);
      launch(scan_forward_kernel<T, kStates, kChannels, false>, own, nullptr, nullptr, saved, deltas.data<A>(), nullptr,
             view, chunks, chunks - 1, groups);
    }
    launch(scan_chunks_kernel<false, T>,
           {.grid = ceil_div(e, 128), .grid_y = n, .grid_z = b, .block = 128, .stream = config.stream}, saved, nullptr,
           deltas.data<A>(), h0, view, chunks, kScanChunk);
  }
  launch(scan_forward_kernel<T, kStates, kChannels, true>, config, y.data<T>(), final_state.data<A>(), saved, nullptr,
         h0, view, chunks, chunks, groups);
}

}  // namespace

void make_scan_states(Tensor& states, const SelectiveScanInputs& in) {
  const int64_t b = in.x.size(0), l = in.x.size(1), e = in.x.size(2), n = in.A.size(1);
  states = scan_walks(in) ? walk_states(in)
                          : empty({b, ceil_div(l, kScanChunk), n, e}, accum_dtype(in.x.dtype()), in.x.device());
}

void selective_scan_forward(Tensor& y, Tensor& final_state, Tensor& states, const SelectiveScanInputs& in) {
  if (scan_walks(in)) return walk_forward(y, final_state, states, in);
  const int64_t b = in.x.size(0), l = in.x.size(1), e = in.x.size(2), n = in.A.size(1);
  const int64_t chunks = ceil_div(l, kScanChunk);
  visit_float(in.x.dtype(), [&]<class T>() {
    // More than one chunk needs the states between them also when nobody keeps them.
    Tensor between = states;
    if (!between.defined() && chunks > 1) between = empty({b, chunks, n, e}, accum_dtype(in.x.dtype()), in.x.device());
    if (n <= 4)
      run_forward<T, 4, 128>(y, final_state, between, in, 1);
    else if (n <= 16)
      run_forward<T, 16, 128>(y, final_state, between, in, 1);
    else
      run_forward<T, 16, 32>(y, final_state, between, in, static_cast<int>(ceil_div(n, 16)));
  });
}

}  // namespace krait::kernels::cuda

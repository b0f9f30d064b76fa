#include "kernels/slstm_step.h"

#include "kernels/cuda/aligned.h"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/cluster_launch.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/recurrence.cuh"
#include "kernels/cuda/step_values.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kBlocks = 8;  // of a cluster, which advances a head
constexpr int kWarps = 12, kThreads = 32 * kWarps;
constexpr int kMaxUnits = 1024;  // of a head

template <class T>
struct StepJob {
  T *y, *conv;  // conv may be null
  float* cell;
  const T *x, *conv_weight, *conv_bias, *w[4], *R;
  const float *bias, *norm;
  int64_t b;
  int h, p, taps;
  bool exp_forget;
  float norm_eps;
};

// A block: p / 8 units of a head for kRows rows; a warp makes one unit at a time, its four gates from eight rows of weights.
// Mean and squared deviations of its units go to the cluster's other blocks, for the norm. Bound by latency at few rows, by
// reading the weights from L2 else.
template <class T, int kRows>
__global__ void __launch_bounds__(kThreads) slstm_step_kernel(StepJob<T> j) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int V = 16 / sizeof(T);
  extern __shared__ float4 shared[];
  __shared__ float2 told[kRows][kBlocks];
  const int t = static_cast<int>(threadIdx.x), lane = t % 32, warp = t / 32, units = j.p / kBlocks;
  float* const in = reinterpret_cast<float*>(shared);  // (kRows, 3, p): u, x, y before
  float* const ys = in + kRows * 3 * j.p;              // (kRows, units)
  const int rank = static_cast<int>(cluster_rank());
  const int64_t head = blockIdx.x / kBlocks, row0 = int64_t{blockIdx.y} * kRows, d = int64_t{j.h} * j.p;
  const int64_t own = rank * units;  // the first of its units
  const auto gate_rows = [&](int g) { return j.w[g] + (head * j.p + own) * j.p; };
  const auto recurrent_rows = [&](int g) { return j.R + ((head * 4 + g) * j.p + own) * j.p; };
  const auto state = [&](int64_t row, int s, int64_t unit) -> float& { return j.cell[((row * 4 + s) * j.h + head) * j.p + unit]; };
  let_next_begin();
  if (t < 8) bring_into_l2(t < 4 ? gate_rows(t) : recurrent_rows(t - 4), int64_t{units} * j.p * static_cast<int64_t>(sizeof(T)));
  cluster_barrier();  // the others' shared memory is there
  wait_for_previous();

  for (int at = t; at < kRows * j.p; at += kThreads) {
    const int r = at / j.p, unit = at % j.p;
    const int64_t row = row0 + r, channel = head * j.p + unit;
    float u = 0, x = 0, before = 0;
    if (row < j.b) {
      x = static_cast<float>(j.x[row * d + channel]);
      before = state(row, 0, unit);
      u = x;
      if (j.conv_weight != nullptr) {
        const T* const filter = j.conv_weight + channel * j.taps;
        const T* const past = j.conv + row * (j.taps - 1) * d + channel;
        float sum = j.conv_bias != nullptr ? static_cast<float>(j.conv_bias[channel]) : 0.0f;
        for (int k = 0; k + 1 < j.taps; ++k) sum += static_cast<float>(filter[k]) * static_cast<float>(past[k * d]);
        sum += static_cast<float>(filter[j.taps - 1]) * x;
        u = static_cast<float>(static_cast<T>(sum / (1.0f + expf(-sum))));
      }
    }
    in[(r * 3 + 0) * j.p + unit] = u;
    in[(r * 3 + 1) * j.p + unit] = x;
    in[(r * 3 + 2) * j.p + unit] = before;
  }
  __syncthreads();
  for (int unit = warp; unit < units; unit += kWarps) {
    const int64_t row = row0 + lane;
    const bool cell_lane = lane < kRows && row < j.b;
    float s[4] = {}, bias[4];
#pragma unroll
    for (int k = 1; k < 4; ++k)
      if (cell_lane) s[k] = state(row, k, own + unit);
#pragma unroll
    for (int g = 0; g < 4; ++g) bias[g] = j.bias[(int64_t{g} * j.h + head) * j.p + own + unit];
    float sums[kRows][4] = {};
    for (int piece = lane; piece < j.p / V; piece += 32) {
      Packed<T, V> w[4], R[4];
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        w[g].load(gate_rows(g) + int64_t{unit} * j.p + piece * V);
        R[g].load(recurrent_rows(g) + int64_t{unit} * j.p + piece * V);
      }
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        float wv[V], rv[V];
        w[g].unpack(wv);
        R[g].unpack(rv);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float4* const x = reinterpret_cast<const float4*>(in + (r * 3 + g / 2) * j.p + piece * V);
          const float4* const y = reinterpret_cast<const float4*>(in + (r * 3 + 2) * j.p + piece * V);
#pragma unroll
          for (int q = 0; q < V / 4; ++q) {
            const float4 a = x[q], b = y[q];
            sums[r][g] += wv[4 * q] * a.x + wv[4 * q + 1] * a.y + wv[4 * q + 2] * a.z + wv[4 * q + 3] * a.w;
            sums[r][g] += rv[4 * q] * b.x + rv[4 * q + 1] * b.y + rv[4 * q + 2] * b.z + rv[4 * q + 3] * b.w;
          }
        }
      }
    }
    float gates[4] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        const float sum = sum_lanes<32>(sums[r][g]);
        if (lane == r) gates[g] = sum;
      }
    if (cell_lane) {
      float saved[7];
      if (j.exp_forget)
        SlstmCell<true>{}.forward<CellMath<float>>(gates, bias, s, saved);
      else
        SlstmCell<false>{}.forward<CellMath<float>>(gates, bias, s, saved);
#pragma unroll
      for (int k = 1; k < 4; ++k) state(row, k, own + unit) = s[k];
    }
    if (lane < kRows) ys[lane * units + unit] = s[0];
  }
  __syncthreads();
  if (warp < kRows) {
    const float* const y = ys + warp * units;
    float mean = 0, squares = 0;
    for (int u = lane; u < units; u += 32) mean += y[u];
    mean = sum_lanes<32>(mean) / static_cast<float>(units);
    for (int u = lane; u < units; u += 32) squares += (y[u] - mean) * (y[u] - mean);
    squares = sum_lanes<32>(squares);
    if (lane < kBlocks)
      asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(of_block(
                       static_cast<uint32_t>(__cvta_generic_to_shared(&told[warp][rank])), static_cast<uint32_t>(lane))),
                   "f"(mean), "f"(squares)
                   : "memory");
  }
  cluster_barrier();  // and all have read y and the convolution's inputs before
  for (int at = t; at < kRows * units; at += kThreads) {
    const int r = at / units, unit = at % units;
    const int64_t row = row0 + r, channel = head * j.p + own + unit;
    if (row >= j.b) continue;
    float mean = 0, squares = 0;
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) {
      mean += told[r][k].x / kBlocks;
      squares += told[r][k].y;
    }
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) squares += static_cast<float>(units) * (told[r][k].x - mean) * (told[r][k].x - mean);
    const float y = ys[r * units + unit], rstd = rsqrtf(squares / static_cast<float>(j.p) + j.norm_eps);
    j.y[row * d + channel] = static_cast<T>((y - mean) * rstd * (1.0f + j.norm[channel]));
    state(row, 0, own + unit) = y;
    if (j.conv == nullptr || j.taps < 2) continue;
    T* const past = j.conv + row * (j.taps - 1) * d + channel;
    for (int k = 0; k + 2 < j.taps; ++k) past[k * d] = past[(k + 1) * d];
    past[(j.taps - 2) * d] = j.x[row * d + channel];
  }
#endif
}

}  // namespace

void slstm_step(bool& done, Tensor& y, Tensor& conv, Tensor& cell, const Tensor& x, const SlstmStepWeights& w) {
  const int64_t b = x.size(0), h = w.R.size(0), p = w.R.size(2);
  done = runs_sm90(x.device()) && (x.dtype() == DType::bf16 || x.dtype() == DType::f32) && p % 8 == 0 && p <= kMaxUnits && b < 65536 &&
         (!w.conv_bias.defined() || w.conv_bias.dtype() == x.dtype()) && aligned(w.w_i, w.w_f, w.w_z, w.w_o, w.R);
  if (!done) return;
  const auto run = [&]<class T, int kRows>() {
    const StepJob<T> job{y.data<T>(), pointer_or_null<T>(conv), cell.data<float>(), x.data<T>(), pointer_or_null<T>(w.conv_weight),
                         pointer_or_null<T>(w.conv_bias), {w.w_i.data<T>(), w.w_f.data<T>(), w.w_z.data<T>(), w.w_o.data<T>()},
                         w.R.data<T>(), w.bias.data<float>(), w.norm.data<float>(), b, static_cast<int>(h), static_cast<int>(p),
                         conv.defined() ? static_cast<int>(w.conv_weight.size(1)) : 0, w.forget == SlstmForget::exp,
                         static_cast<float>(w.norm_eps)};
    launch_with({clusters_of(kBlocks), overlapping()}, slstm_step_kernel<T, kRows>,
                {.grid = h * kBlocks, .grid_y = ceil_div(b, kRows), .block = kThreads,
                 .shared = kRows * (3 * p + p / kBlocks) * static_cast<int64_t>(sizeof(float)), .stream = current_stream(x.device())},
                job);
  };
  const auto of_dtype = [&]<class T>() {
    if (b == 1) return run.template operator()<T, 1>();
    run.template operator()<T, 4>();
  };
  if (x.dtype() == DType::bf16) return of_dtype.template operator()<bf16>();
  of_dtype.template operator()<float>();
}

}  // namespace krait::kernels::cuda

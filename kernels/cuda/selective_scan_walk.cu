#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/selective_scan_walk.cuh"

namespace krait::kernels::cuda {

namespace {

struct WalkOutputs {
  bf16* y;
  float* final_state;  // (b, e, n)
  uint4* states;       // (b, chunks, 2, e, 8) in bf16, before every kWalkKept-th position; may be null
  float* edges;        // (b, spans, n, e): what a span starts from, or makes of 0; null with one span
  float* deltas;       // (b, spans, e): sums of a span's time steps
};

// kOutput: y, states and the final state, from edges or h0. Else edges and deltas of a span that starts from 0.
// kUsual: with softplus and a gate, and no branch for either.
// Bound by the special functions, b l e (n + 4) of them at 16 a cycle and multiprocessor: B32 E1536 L2048 0.56 ms at
// 1.7 GHz; the instructions, about 145 a warp and position, would take 0.51 ms, memory 0.3 ms.
template <bool kOutput, bool kUsual>
__global__ void __launch_bounds__(kWalkThreads, 3)
    walk_forward_kernel(const WalkOutputs out, const float* __restrict__ h0, const ScanView<bf16> in, int64_t length,
                        int64_t spans, int64_t used_spans, bool wide) {
  constexpr int kCopied = 8, kTensors = kOutput ? 3 : 2, kGroup = 4;  // positions copied, and prepared, together
  __shared__ float4 rows[2][kWalkRows * 8];
  __shared__ __align__(16) bf16 stage[2][kWalkThreads / 32][kTensors][kCopied][32];
  const WalkPlace at(in.e, in.l, length, used_spans);
  const int t1 = at.t1, lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const uint32_t channel = at.channel, e = static_cast<uint32_t>(in.e), z_row = static_cast<uint32_t>(in.z_row);
  const bool gated = kOutput && (kUsual || in.z != nullptr), softplus = kUsual || in.softplus;
  const int64_t begin = at.row * in.l * in.e;
  bf16* y = out.y + begin;
  const float bias = in.bias == nullptr ? 0.0f : in.bias[channel], d = in.d == nullptr ? 0.0f : in.d[channel];
  const int64_t edge = ((at.row * spans + at.span) * kWalkStates) * in.e + channel;

  // Lane 4 i + j copies 8 channels of position i for its warp.
  const uint32_t copied = at.warp_channel + lane % 4 * 8;
  const auto copy = [&](int from, int buffer) {
    const uint32_t t = static_cast<uint32_t>(from + lane / 4);
    const bool valid = copied < e && from + lane / 4 < t1;
    bf16* to = stage[buffer][warp][0][lane / 4] + lane % 4 * 8;
    copy_async(to, at_place(in.x + begin, t * e + copied), valid);
    copy_async(to + kCopied * 32, at_place(in.dt + begin, t * e + copied), valid);
    if (gated) copy_async(to + 2 * kCopied * 32, at_place(in.z + at.row * in.z_batch, t * z_row + copied), valid);
    copy_commit();
  };

  float a[kWalkStates], h[kWalkStates];
#pragma unroll
  for (int i = 0; i < kWalkStates; ++i) {
    a[i] = in.a[int64_t{channel} * kWalkStates + i] * static_cast<float>(kLog2E);
    h[i] = 0;
    if (kOutput && out.edges != nullptr)
      h[i] = out.edges[edge + i * in.e];
    else if (kOutput && h0 != nullptr)
      h[i] = h0[(at.row * in.e + channel) * kWalkStates + i];
  }
  float sum = 0;

  uint4 fetched = fetch_state_rows(in, at.row, at.t0, t1, wide);
  copy(at.t0, 0);
  for (int tile = at.t0, odd = 0, buffer = 0; tile < t1; tile += kWalkRows, odd ^= 1) {
    keep_state_rows(rows[odd], fetched);
    __syncthreads();
    fetched = fetch_state_rows(in, at.row, tile + kWalkRows, t1, wide);
    uint32_t marks = __ballot_sync(0xFFFFFFFFu, in.begins(at.row, int64_t{tile} + lane));
    const int end = tile + kWalkRows < t1 ? tile + kWalkRows : t1;
    const float4* row = rows[odd];
    for (int t = tile; t < end; buffer ^= 1) {
      copy(t + kCopied, buffer ^ 1);
      if (kOutput && out.states != nullptr && t % kWalkKept == 0 && at.active) {
        const int64_t chunks = (in.l + kWalkKept - 1) / kWalkKept;
        uint4* to = out.states + (at.row * chunks + t / kWalkKept) * 2 * in.e + channel;
        const auto four = [&](int i) {
          return uint4{pack(h[i], h[i + 1]), pack(h[i + 2], h[i + 3]), pack(h[i + 4], h[i + 5]),
                       pack(h[i + 6], h[i + 7])};
        };
        to[0] = four(0);
        to[in.e] = four(8);
      }
      copy_wait<1>();
      __syncwarp();
      const bf16* mine = stage[buffer][warp][0][0] + lane;
#pragma unroll 1
      for (int group = 0; group < kCopied; group += kGroup, t += kGroup, row += 8 * kGroup, marks >>= kGroup) {
        float delta[kGroup], value[kGroup], gate[kGroup];
#pragma unroll
        for (int s = 0; s < kGroup; ++s) {
          value[s] = staged(mine + (group + s) * 32);
          const float raw = staged(mine + (kCopied + group + s) * 32) + bias;
          delta[s] = softplus ? walk_softplus(raw) : raw;
          if (t + s >= t1) delta[s] = 0;
          if (!kOutput) sum += delta[s];
          const float c = gated ? fmaxf(staged(mine + (2 * kCopied + group + s) * 32), -110.0f) : 0.0f;
          gate[s] = gated ? c * walk_sigmoid(c) : 1.0f;
        }
#pragma unroll
        for (int s = 0; s < kGroup; ++s) {
          const float dx = delta[s] * value[s], forget = forgetting(marks, s);
          float u[4] = {d * value[s], 0, 0, 0};
#pragma unroll
          for (int q = 0; q < kWalkStates / 4; ++q) {
            const float4 b = row[8 * s + q], c = kOutput ? row[8 * s + 4 + q] : float4{};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int i = 4 * q + j;
              h[i] = fmaf(scan_exp2(fmaf(delta[s], a[i], forget)), h[i], dx * state_of(b, j));
              if (kOutput) u[j] = fmaf(state_of(c, j), h[i], u[j]);
            }
          }
          if (kOutput)
            store_if(at.active && t + s < t1, at_place(y, static_cast<uint32_t>(t + s) * e + channel),
                     gate[s] * ((u[0] + u[1]) + (u[2] + u[3])));
        }
      }
      __syncwarp();
    }
  }
  copy_wait<0>();

  if (!at.active) return;
#pragma unroll
  for (int i = 0; i < kWalkStates; ++i) {
    if (!kOutput)
      out.edges[edge + i * in.e] = h[i];
    else if (t1 == in.l)
      out.final_state[(at.row * in.e + channel) * kWalkStates + i] = h[i];
  }
  if (!kOutput) out.deltas[(at.row * spans + at.span) * in.e + channel] = sum;
}

}  // namespace

bool scan_walks(const SelectiveScanInputs& in) {
  const int64_t l = in.x.size(1), e = in.x.size(2), limit = int64_t{1} << 31;
  if (in.x.dtype() != DType::bf16 || in.A.size(1) != kWalkStates || e % 8 != 0 || (l + 64) * e >= limit) return false;
  return !in.z.defined() || ((l + 64) * in.z.stride(1) < limit && scan_rows_wide(in.z));
}

bool scan_rows_wide(const Tensor& t) {
  return aligned16(t.data<bf16>()) && t.stride(0) % 8 == 0 && t.stride(1) % 8 == 0;
}

Tensor walk_input(const Tensor& t) {
  if (t.is_contiguous() && aligned16(t.data<bf16>())) return t;
  Tensor copy = empty(t.shape(), t.dtype(), t.device());
  copy_(copy, t);
  return copy;
}

Tensor walk_states(const SelectiveScanInputs& in) {
  const int64_t chunks = ceil_div(in.x.size(1), kWalkKept);
  return empty({in.x.size(0), chunks, 2, in.x.size(2), 8}, DType::bf16, in.x.device());
}

void walk_forward(Tensor& y, Tensor& final_state, Tensor& states, const SelectiveScanInputs& given) {
  SelectiveScanInputs in = given;
  in.x = walk_input(in.x);
  in.dt = walk_input(in.dt);
  const int64_t b = in.x.size(0), e = in.x.size(2);
  const Device device = in.x.device();
  const ScanView<bf16> view = scan_view<bf16>(in);
  const bool wide = scan_rows_wide(in.B) && scan_rows_wide(in.C), usual = in.softplus && in.z.defined();
  const WalkSpans spans = walk_spans(in);
  const float* h0 = scan_pointer<float>(in.h0);
  LaunchConfig config{.grid = b * spans.count,
                      .grid_y = ceil_div(e, kWalkThreads),
                      .block = kWalkThreads,
                      .stream = current_stream(device)};
  WalkOutputs out{y.data<bf16>(), final_state.data<float>(), states.defined() ? reinterpret_cast<uint4*>(states.data<bf16>()) : nullptr, nullptr,
                  nullptr};
  Tensor edges, deltas;
  if (spans.count > 1) {
    edges = empty({b, spans.count, kWalkStates, e}, DType::f32, device);
    deltas = empty({b, spans.count, e}, DType::f32, device);
    out.edges = edges.data<float>();
    out.deltas = deltas.data<float>();
    LaunchConfig own = config;
    own.grid = b * (spans.count - 1);
    launch(in.softplus ? walk_forward_kernel<false, true> : walk_forward_kernel<false, false>, own, out, nullptr, view, spans.length, spans.count, spans.count - 1, wide);
    launch(scan_chunks_kernel<false, bf16>,
           {.grid = ceil_div(e, 128), .grid_y = kWalkStates, .grid_z = b, .block = 128, .stream = config.stream},
           out.edges, nullptr, out.deltas, h0, view, spans.count, spans.length);
  }
  launch(usual ? walk_forward_kernel<true, true> : walk_forward_kernel<true, false>, config, out, h0, view, spans.length, spans.count, spans.count, wide);
}

}  // namespace krait::kernels::cuda

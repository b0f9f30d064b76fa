#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/selective_scan_walk.cuh"

namespace krait::kernels::cuda {

namespace {

struct WalkOutputs {
  bf16* y;
  float* final_state;  // (b, e, n)
  float* states;       // (b, chunks, n, e), before every kScanChunk-th position; may be null
  float* edges;        // (b, spans, n, e): what a span starts from, or makes of 0; null with one span
  float* deltas;       // (b, spans, e): sums of a span's time steps
};

// kOutput: y, states and the final state, from edges or h0. Else edges and deltas of a span that starts from 0.
// Bound by the special functions, 16 b l e (n + 4) of them at 16 a cycle and multiprocessor: B32 E1536 L2048 0.56 ms at
// 1.7 GHz. 8 issue slots fewer than that time holds would be lost to anything else: per state a product for the
// exponent, delta x B, h and u; per position B and C once for all threads of a warp.
template <bool kOutput>
__global__ void __launch_bounds__(kWalkThreads, 3)
    walk_forward_kernel(const WalkOutputs out, const float* __restrict__ h0, const ScanView<bf16> in, int64_t length,
                        int64_t spans, int64_t used_spans, bool wide) {
  __shared__ float4 rows[2][kWalkRows * 8];
  const WalkPlace at(in.e, in.l, length, used_spans);
  const int t1 = at.t1;
  const uint32_t channel = at.channel;
  const uint32_t e = static_cast<uint32_t>(in.e), z_row = static_cast<uint32_t>(in.z_row);
  const int64_t begin = at.row * in.l * in.e;
  const bf16 *x = in.x + begin, *dt = in.dt + begin;
  const bf16* z = kOutput && in.z != nullptr ? in.z + at.row * in.z_batch : nullptr;
  bf16* y = out.y + begin;
  const float bias = in.bias == nullptr ? 0.0f : in.bias[channel], d = in.d == nullptr ? 0.0f : in.d[channel];
  const int64_t edge = ((at.row * spans + at.span) * kWalkStates) * in.e + channel;

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

  // The raw inputs of kWalkAhead positions.
  struct Ahead {
    uint32_t x[kWalkAhead], dt[kWalkAhead], z[kWalkAhead];
  };
  const auto load = [&](int from) {
    Ahead v;
#pragma unroll
    for (int s = 0; s < kWalkAhead; ++s) {
      const uint32_t t = static_cast<uint32_t>(from + s), place = t * e + channel;
      v.dt[s] = load_raw(at_place(dt, place));
      v.x[s] = load_raw(at_place(x, place));
      v.z[s] = z == nullptr ? 0 : load_raw(at_place(z, t * z_row + channel));
    }
    return v;
  };
  // One position, with its row [B; C].
  const auto step = [&](int t, uint32_t raw_x, uint32_t raw_dt, uint32_t raw_z, const float4* row, float forget) {
    const float value = low_half(raw_x), raw = low_half(raw_dt) + bias;
    const float delta = in.softplus ? walk_softplus(raw) : raw, dx = delta * value;
    if (!kOutput) sum += delta;
    float u[4] = {d * value, 0, 0, 0};
#pragma unroll
    for (int q = 0; q < kWalkStates / 4; ++q) {
      const float4 b = row[q], c = kOutput ? row[4 + q] : float4{};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = 4 * q + j;
        h[i] = fmaf(scan_exp2(fmaf(delta, a[i], forget)), h[i], dx * state_of(b, j));
        if (kOutput) u[j] = fmaf(state_of(c, j), h[i], u[j]);
      }
    }
    if (!kOutput) return;
    float result = (u[0] + u[1]) + (u[2] + u[3]);
    if (z != nullptr) {
      const float gate = fmaxf(low_half(raw_z), -110.0f);
      result *= gate * walk_sigmoid(gate);
    }
    store_if(at.active, at_place(y, static_cast<uint32_t>(t) * e + channel), static_cast<bf16>(result));
  };

  const int full = at.t0 + (t1 - at.t0) / kWalkAhead * kWalkAhead;  // from here on one by one
  uint4 fetched = fetch_state_rows(in, at.row, at.t0, t1, wide);
  Ahead now{};
  if (full > at.t0) now = load(at.t0);
  for (int tile = at.t0, odd = 0; tile < t1; tile += kWalkRows, odd ^= 1) {
    keep_state_rows(rows[odd], fetched);
    __syncthreads();
    fetched = fetch_state_rows(in, at.row, tile + kWalkRows, t1, wide);
    const uint32_t begins =
        __ballot_sync(0xFFFFFFFFu, in.begins(at.row, int64_t{tile} + static_cast<int>(threadIdx.x) % 32));
    if (kOutput && out.states != nullptr && tile % kScanChunk == 0 && at.active) {
      const int64_t chunks = (in.l + kScanChunk - 1) / kScanChunk;
      float* to = out.states + (at.row * chunks + tile / kScanChunk) * kWalkStates * in.e + channel;
#pragma unroll
      for (int i = 0; i < kWalkStates; ++i) to[i * in.e] = h[i];
    }
    const int end = tile + kWalkRows < full ? tile + kWalkRows : full;
    const float4* row = rows[odd];
    uint32_t marks = begins;
    int t = tile;
    for (; t < end; t += kWalkAhead, row += 8 * kWalkAhead, marks >>= kWalkAhead) {
      const Ahead next = load(t + kWalkAhead < full ? t + kWalkAhead : t);
#pragma unroll
      for (int s = 0; s < kWalkAhead; ++s)
        step(t + s, now.x[s], now.dt[s], now.z[s], row + 8 * s, forgetting(marks, s));
      now = next;
    }
    if (t < tile + kWalkRows)
      for (; t < t1; ++t, row += 8, marks >>= 1) {
        const uint32_t place = static_cast<uint32_t>(t) * e + channel;
        step(t, load_raw(at_place(x, place)), load_raw(at_place(dt, place)),
             z == nullptr ? 0 : load_raw(at_place(z, static_cast<uint32_t>(t) * z_row + channel)), row, forgetting(marks, 0));
      }
  }

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
  const bool z_fits = !in.z.defined() || (l * in.z.stride(1) + e < limit);
  return in.x.dtype() == DType::bf16 && in.A.size(1) == kWalkStates && l * e + e < limit && z_fits;
}

bool scan_rows_wide(const SelectiveScanInputs& in) {
  const auto whole = [](const Tensor& t) { return t.stride(0) % 8 == 0 && t.stride(1) % 8 == 0; };
  return aligned16(in.B.data<bf16>(), in.C.data<bf16>()) && whole(in.B) && whole(in.C);
}

SelectiveScanInputs walk_inputs(const SelectiveScanInputs& in) {
  SelectiveScanInputs out = in;
  out.x = in.x.contiguous();
  out.dt = in.dt.contiguous();
  return out;
}

void walk_forward(Tensor& y, Tensor& final_state, Tensor& states, const SelectiveScanInputs& given) {
  const SelectiveScanInputs in = walk_inputs(given);
  const int64_t b = in.x.size(0), e = in.x.size(2);
  const Device device = in.x.device();
  const ScanView<bf16> view = scan_view<bf16>(in);
  const bool wide = scan_rows_wide(in);
  const WalkSpans spans = walk_spans(in);
  const float* h0 = scan_pointer<float>(in.h0);
  LaunchConfig config{.grid = b * spans.count,
                      .grid_y = ceil_div(e, kWalkThreads),
                      .block = kWalkThreads,
                      .stream = current_stream(device)};
  WalkOutputs out{y.data<bf16>(), final_state.data<float>(), states.defined() ? states.data<float>() : nullptr, nullptr,
                  nullptr};
  Tensor edges, deltas;
  if (spans.count > 1) {
    edges = empty({b, spans.count, kWalkStates, e}, DType::f32, device);
    deltas = empty({b, spans.count, e}, DType::f32, device);
    out.edges = edges.data<float>();
    out.deltas = deltas.data<float>();
    LaunchConfig own = config;
    own.grid = b * (spans.count - 1);
    launch(walk_forward_kernel<false>, own, out, nullptr, view, spans.length, spans.count, spans.count - 1, wide);
    launch(scan_chunks_kernel<false, bf16>,
           {.grid = ceil_div(e, 128), .grid_y = kWalkStates, .grid_z = b, .block = 128, .stream = config.stream},
           out.edges, nullptr, out.deltas, h0, view, spans.count, spans.length);
  }
  launch(walk_forward_kernel<true>, config, out, h0, view, spans.length, spans.count, spans.count, wide);
}

}  // namespace krait::kernels::cuda

#include "kernels/cuda/selective_scan_slots.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kWalkWarps = kWalkThreads / 32;
constexpr int kWalkAhead = 4;  // positions whose inputs are loaded together
constexpr int kTile = 4;       // positions prepared together
constexpr int kTiles = kWalkKept / kTile;
constexpr int kSlots = kWalkKept - 2;   // states of a chunk's positions in shared memory, the last two aside
constexpr int64_t kSlotBytes = 1024;    // a warp's states (2, 32, 8), or one of its inputs (kWalkKept, 32), in bf16
constexpr int64_t kWarpBytes = (kSlots + 4) * kSlotBytes;
constexpr int64_t kShared = kWalkWarps * kWarpBytes + kWalkKept * 128;

struct WalkGradients {
  bf16 *dx, *ddt;  // (b, l, e)
  bf16 *dz, *y;    // dz (b, l, e), rows may be apart; y (b, l, e); either may be null
  int64_t dz_batch, dz_row;
  float* da;    // (b, spans, n, e)
  float* rows;  // (b spans, 2, e): parts of dD and of ddt_bias
  float* bc;    // (blocks of channels, b, l, 2, n): parts of dB and dC
  float* dh0;   // (b, e, n); may be null
};

struct WalkUpstream {
  const bf16* dy;         // (b, l, e)
  const float* dfinal;    // (b, e, n); may be null
  const float* received;  // (b, spans, n, e); null with one span
};

// silu(z), g = dy silu(z) and dy silu'(z), which u is multiplied by for dz.
struct Gate {
  float silu = 1, g, of_u = 0;
  __device__ Gate(float dy, float z, bool gated) : g(dy) {
    if (!gated) return;
    const float c = fmaxf(z, -110.0f), s = walk_sigmoid(c);
    silu = c * s;
    g = dy * silu;
    of_u = dy * s * (1.0f + c * (1.0f - s));
  }
};

// softplus and its derivative.
struct TimeStep {
  float delta, slope = 1;
  __device__ __forceinline__ TimeStep(float raw, bool softplus) : delta(raw) {
    if (!softplus) return;
    const float p = scan_exp2(-fabsf(raw) * static_cast<float>(kLog2E));
    delta = walk_softplus_of(raw, p);
    slope = reciprocal_fast(1.0f + p) * (raw >= 0.0f ? 1.0f : p);
  }
};

// What a span alone sends back: r = exp(delta A) lambda before its first position, and its sum of time steps.
__global__ void __launch_bounds__(kWalkThreads, 3)
    walk_reverse_kernel(float* __restrict__ edges, float* __restrict__ deltas, const WalkUpstream up,
                        const ScanView<bf16> in, int64_t length, int64_t spans, bool wide) {
  __shared__ float4 rows[kWalkRows * 8];
  const WalkPlace at(in.e, in.l, length, spans);
  const int t1 = at.t1, channel = at.channel;
  const uint32_t e = static_cast<uint32_t>(in.e), z_row = static_cast<uint32_t>(in.z_row);
  const bf16* dt = in.dt + at.row * in.l * in.e;
  const bf16* z = in.z == nullptr ? nullptr : in.z + at.row * in.z_batch;
  const bf16* dy = up.dy + at.row * in.l * in.e;
  const float bias = in.bias == nullptr ? 0.0f : in.bias[channel];
  float a[kWalkStates], r[kWalkStates] = {}, sum = 0;
#pragma unroll
  for (int i = 0; i < kWalkStates; ++i)
    a[i] = in.a[int64_t{channel} * kWalkStates + i] * static_cast<float>(kLog2E);
  for (int tile = at.t0 + (t1 - 1 - at.t0) / kWalkRows * kWalkRows; tile >= at.t0; tile -= kWalkRows) {
    __syncthreads();
    keep_state_rows(rows, fetch_state_rows(in, at.row, tile, t1, wide));
    const uint32_t begins =
        __ballot_sync(0xFFFFFFFFu, in.begins(at.row, int64_t{tile} + static_cast<int>(threadIdx.x) % 32));
    __syncthreads();
    for (int from = tile + kWalkRows - kWalkAhead; from >= tile; from -= kWalkAhead) {
      float raw_dt[kWalkAhead], raw_z[kWalkAhead], raw_dy[kWalkAhead];
#pragma unroll
      for (int s = 0; s < kWalkAhead; ++s) {
        const uint32_t t = static_cast<uint32_t>(from + s < t1 ? from + s : t1 - 1), place = t * e + channel;
        raw_dt[s] = static_cast<float>(dt[place]);
        raw_dy[s] = static_cast<float>(dy[place]);
        raw_z[s] = z == nullptr ? 0.0f : static_cast<float>(z[t * z_row + channel]);
      }
#pragma unroll
      for (int s = kWalkAhead - 1; s >= 0; --s) {
        const bool real = from + s < t1;
        const float raw = raw_dt[s] + bias;
        const float delta = !real ? 0.0f : in.softplus ? walk_softplus(raw) : raw;
        const float g = real ? Gate(raw_dy[s], raw_z[s], z != nullptr).g : 0.0f, forget = forgetting(begins, from + s - tile);
        sum += delta;
#pragma unroll
        for (int q = 0; q < kWalkStates / 4; ++q) {
          const float4 c = rows[(from + s - tile) * 8 + 4 + q];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int i = 4 * q + j;
            r[i] = scan_exp2(fmaf(delta, a[i], forget)) * fmaf(g, state_of(c, j), r[i]);
          }
        }
      }
    }
  }
  if (!at.active) return;
  const int64_t place = at.row * spans + at.span;
#pragma unroll
  for (int i = 0; i < kWalkStates; ++i) edges[(place * kWalkStates + i) * in.e + channel] = r[i];
  deltas[place * in.e + channel] = sum;
}

// The gradients of a span, from its last chunk of kWalkKept positions to its first. A chunk is walked twice: forwards
// from the kept state before it, its states put into slots of shared memory (bf16), and backwards, where lambda takes the
// slots that have served. Sums over the channels of a warp (dC, dB) read the slots as matrices for the tensor cores; over
// warps they are made in shared memory, over blocks in a second pass: no atomics. A warp's inputs of the next chunk come
// in the background into the rows that the walk backwards leaves, so chunks take the rows up and down in turn.
// kUsual: with softplus and a gate, and no branch for either.
// Bound by the instructions, about 460 a warp and position (B32 E1536 L2048 1.6 ms at 1.7 GHz), then by the special
// functions, b l e (2 n + 7) of them at 16 a cycle and multiprocessor (1.1 ms); one H100 takes 2.1 ms.
template <bool kUsual>
__global__ void __launch_bounds__(kWalkThreads, 3)
    walk_backward_kernel(const WalkGradients out, const WalkUpstream up, const uint4* __restrict__ states,
                         const ScanView<bf16> in, int64_t length, int64_t spans, bool wide) {
  extern __shared__ uint4 walk_shared[];
  char* shared = reinterpret_cast<char*>(walk_shared);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  char* slots = shared + warp * kWarpBytes;                                  // (kSlots)
  char* stage = slots + kSlots * kSlotBytes;                                 // x, dt, dy, z, each (kWalkKept, 32)
  char* spare = stage + 3 * kSlotBytes;                                      // a slot once z has served
  float4* rows = reinterpret_cast<float4*>(shared + kWalkWarps * kWarpBytes);  // B and C (kWalkKept, 8)
  const WalkPlace at(in.e, in.l, length, spans);
  const int t1 = at.t1, limit = at.active ? t1 : 0;
  const uint32_t channel = at.channel, e = static_cast<uint32_t>(in.e);
  const bool gated = kUsual || in.z != nullptr, softplus = kUsual || in.softplus;
  const int64_t chunks = (in.l + kWalkKept - 1) / kWalkKept, begin = at.row * in.l * in.e;
  const uint32_t z_row = static_cast<uint32_t>(in.z_row), dz_row = static_cast<uint32_t>(out.dz_row);
  bf16 *dx_out = out.dx + begin, *ddt_out = out.ddt + begin, *y_out = out.y + begin;
  bf16* dz_out = out.dz + at.row * out.dz_batch;
  const float bias = in.bias == nullptr ? 0.0f : in.bias[channel], d = in.d == nullptr ? 0.0f : in.d[channel];
  float* bc = out.bc + (int64_t{blockIdx.y} * (gridDim.x / spans) + at.row) * in.l * (2 * kWalkStates);

  // A lane copies 8 channels of position lane / 4 % 4 of a tile for its warp: of x or dt, and of dy or z.
  const uint32_t copied = at.warp_channel + lane % 4 * 8, copied_row = lane / 4 % 4;
  const bf16* copy_first = (lane < 16 ? in.x : in.dt) + begin;
  const bf16* copy_second = lane < 16 || !gated ? up.dy + begin : in.z + at.row * in.z_batch;
  const uint32_t second_row = lane < 16 || !gated ? e : z_row;
  char* copy_to = stage + lane / 16 * kSlotBytes + lane % 4 * 16;
  const auto copy = [&](int chunk_first, int tile, uint32_t flip) {
    const uint32_t t = static_cast<uint32_t>(chunk_first + tile * kTile) + copied_row;
    const bool valid = copied < e && static_cast<int>(t) < t1;
    char* to = copy_to + ((tile * 256 + copied_row * 64) ^ flip);
    copy_async(to, at_place(copy_first, t * e + copied), valid);
    copy_async(to + 2 * kSlotBytes, at_place(copy_second, t * second_row + copied), valid);
    copy_commit();
  };
  char* mine = stage + lane * 2;  // x; dt, dy and z each kSlotBytes on
  const auto value_at = [&](uint32_t place, int tensor) {
    return staged(reinterpret_cast<const bf16*>(mine + place + tensor * kSlotBytes));
  };
  const auto set_value = [&](uint32_t place, int tensor, float v) {
    *reinterpret_cast<bf16*>(mine + place + tensor * kSlotBytes) = static_cast<bf16>(v);
  };

  float a[kWalkStates], r[kWalkStates], da[kWalkStates];
#pragma unroll
  for (int i = 0; i < kWalkStates; ++i) {
    a[i] = in.a[int64_t{channel} * kWalkStates + i] * static_cast<float>(kLog2E);
    da[i] = r[i] = 0;
    if (up.received != nullptr)
      r[i] = up.received[((at.row * spans + at.span) * kWalkStates + i) * in.e + channel];
    else if (up.dfinal != nullptr)
      r[i] = up.dfinal[(at.row * in.e + channel) * kWalkStates + i];
  }
  float dd = 0, dbias = 0;

  uint32_t flip = 0;  // 64 * 15 in every other chunk, whose positions take the rows from the last on
  int first = (t1 - 1) / kWalkKept * kWalkKept;
  for (int tile = 0; tile < kTiles; ++tile) copy(first, tile, flip);
  const auto fetch_rows = [&](int from) {
    const int end = from + kWalkKept < t1 ? from + kWalkKept : t1;
    return fetch_state_rows(in, at.row, from, end, wide);
  };
  const auto keep_rows = [&](const uint4& v) {
    if (tid < 4 * kWalkKept) keep_state_rows(rows, v);
  };
  keep_rows(fetch_rows(first));
  for (; first >= at.t0; first -= kWalkKept) {
    const uint4* start = states + ((at.row * chunks + first / kWalkKept) * 2) * in.e + channel;
    const uint32_t marks = __ballot_sync(0xFFFFFFFFu, in.begins(at.row, int64_t{first} + lane));
    __syncthreads();  // rows

    ChannelSums dc;
    StatePair before;  // of the position that comes next
    {
      before = {start[0], start[in.e]};
      float h[kWalkStates];
#pragma unroll
      for (int i = 0; i < kWalkStates; ++i) h[i] = before[i];
#pragma unroll 1
      for (int tile = 0; tile < kTiles; ++tile) {
        const int from = first + tile * kTile;
        const uint32_t tile_place = (tile * 256) ^ flip;
        copy_wait<3>();
        __syncwarp();
        float delta[kTile], dx[kTile], skip[kTile], silu[kTile], of_u[kTile], g[kTile];
#pragma unroll
        for (int s = 0; s < kTile; ++s) {
          const uint32_t place = tile_place ^ (s * 64);
          const float value = value_at(place, 0), raw = value_at(place, 1) + bias;
          delta[s] = softplus ? walk_softplus(raw) : raw;
          if (from + s >= t1) delta[s] = 0;
          const Gate gate(value_at(place, 2), gated ? value_at(place, 3) : 0.0f, gated);
          g[s] = gate.g;
          dx[s] = delta[s] * value;
          skip[s] = d * value;
          silu[s] = gate.silu;
          of_u[s] = gate.of_u;
          dd = fmaf(gate.g, value, dd);  // zeros were copied from t1 on
        }
#pragma unroll
        for (int s = 0; s < kTile; ++s) set_value(tile_place ^ (s * 64), 2, g[s]);  // after all that is read
        __syncwarp();
        dc.load_factors(stage + 2 * kSlotBytes, tile / 2, flip, lane);
        const auto advance = [&]<int s>() {
          const float forget = forgetting(marks, tile * kTile + s);
          const float4* row = rows + (tile * kTile + s) * 8;
          float u[2] = {skip[s], 0};
#pragma unroll
          for (int q = 0; q < kWalkStates / 4; ++q) {
            const float4 b = row[q], c = row[4 + q];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int i = 4 * q + j;
              h[i] = fmaf(scan_exp2(fmaf(delta[s], a[i], forget)), h[i], dx[s] * state_of(b, j));
              u[j % 2] = fmaf(state_of(c, j), h[i], u[j % 2]);
            }
          }
          const float pre = u[0] + u[1];
          const bool real = from + s < limit;
          const uint32_t t = static_cast<uint32_t>(from + s);
          if (gated) store_if(real, at_place(dz_out, t * dz_row + channel), of_u[s] * pre);
          store_if(real && out.y != nullptr, at_place(y_out, t * e + channel), silu[s] * pre);

          const StatePair packed = StatePair::of(h);
          char* slot = s >= 2 && tile == kTiles - 1 ? spare : slots + (tile * kTile + s) * kSlotBytes;
          if (s == 3) __syncwarp();  // the spare slot's last reader
          packed.store(slot, lane);
          if (s == 2) before = packed;
          __syncwarp();
          dc.template add<s % 2 == 1>(slot, lane, lane % 4 == tile % 2 * 2 + s / 2);
        };
        advance.template operator()<0>();
        advance.template operator()<1>();
        advance.template operator()<2>();
        advance.template operator()<3>();
        dc.turn(tile == 1);
        copy_commit();  // an empty group, so that the next tile's is always the fourth last
      }
    }

    const bool more = first > at.t0;
    const uint4 fetched = fetch_rows(more ? first - kWalkKept : t1);
    ChannelSums db;
#pragma unroll 1
    for (int tile = kTiles - 1; tile >= 0; --tile) {
      const int from = first + tile * kTile;
      const uint32_t tile_place = (tile * 256) ^ flip;
      float delta[kTile], slope[kTile], value[kTile], g[kTile];
#pragma unroll
      for (int s = 0; s < kTile; ++s) {
        const uint32_t place = tile_place ^ (s * 64);
        value[s] = value_at(place, 0);
        g[s] = value_at(place, 2);
        const TimeStep step(value_at(place, 1) + bias, softplus);
        delta[s] = from + s < t1 ? step.delta : 0.0f;
        slope[s] = step.slope;
      }
#pragma unroll
      for (int s = 0; s < kTile; ++s) set_value(tile_place ^ (s * 64), 0, delta[s] * value[s]);
      __syncwarp();
      db.load_factors(stage, tile / 2, flip, lane);
      const auto retreat = [&]<int s>() {
        const float forget = forgetting(marks, tile * kTile + s);
        const float4* row = rows + (tile * kTile + s) * 8;
        const StatePair h = before;
        // Slot s - 2 holds what comes before the next position; then it takes this one's lambda.
        const bool inside = s >= 2 || tile > 0;
        char* slot = slots + (tile * kTile + s + (inside ? -2 : kSlots - 2)) * kSlotBytes;
        if (inside)
          before = StatePair::load(slot, lane);
        else if (s == 1)
          before = {start[0], start[in.e]};
        float lambda[kWalkStates], lambda_b[2] = {}, exponent[2] = {};
#pragma unroll
        for (int q = 0; q < kWalkStates / 4; ++q) {
          const float4 b = row[q], c = row[4 + q];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int i = 4 * q + j;
            lambda[i] = fmaf(g[s], state_of(c, j), r[i]);
            r[i] = scan_exp2(fmaf(delta[s], a[i], forget)) * lambda[i];
            const float of_exponent = r[i] * h[i];
            lambda_b[j % 2] = fmaf(lambda[i], state_of(b, j), lambda_b[j % 2]);
            exponent[j % 2] = fmaf(of_exponent, a[i], exponent[j % 2]);
            da[i] = fmaf(of_exponent, delta[s], da[i]);
          }
        }
        StatePair::of(lambda).store(slot, lane);
        __syncwarp();
        db.template add<s % 2 == 1>(slot, lane, lane % 4 == tile % 2 * 2 + s / 2);

        const float total = lambda_b[0] + lambda_b[1];
        const float ddt =
            slope[s] * fmaf(exponent[0] + exponent[1], static_cast<float>(1.0 / kLog2E), value[s] * total);
        const bool real = from + s < limit;
        const uint32_t place = static_cast<uint32_t>(from + s) * e + channel;
        store_if(real, at_place(dx_out, place), fmaf(delta[s], total, d * g[s]));
        store_if(real, at_place(ddt_out, place), ddt);
        dbias += real ? ddt : 0.0f;
      };
      retreat.template operator()<3>();
      retreat.template operator()<2>();
      retreat.template operator()<1>();
      retreat.template operator()<0>();
      db.turn(tile == 2);
      __syncwarp();
      if (more)
        copy(first - kWalkKept, kTiles - 1 - tile, flip ^ (15 * 64));
    }

    // dB and dC of the chunk: the warps' own sums into slots that have served, then the sum of the warps.
    float* sums = reinterpret_cast<float*>(shared + 4 * kSlotBytes);
    db.store(sums + warp * (kWarpBytes / 4), 0, lane);
    dc.store(sums + warp * (kWarpBytes / 4) + kWalkStates, 1, lane);
    __syncthreads();
    keep_rows(fetched);
#pragma unroll
    for (int k = 0; k < kTile; ++k) {
      const int t = first + 4 * k + tid / 32;
      const float* v = sums + (4 * k + tid / 32) * kSumRow + tid % 32;
      float s = v[0];
#pragma unroll
      for (int w = 1; w < kWalkWarps; ++w) s += v[w * (kWarpBytes / 4)];
      if (t < t1) bc[int64_t{t} * (2 * kWalkStates) + tid % 32] = s;
    }
    flip ^= 15 * 64;
  }
  copy_wait<0>();

  if (!at.active) return;
  const int64_t place = at.row * spans + at.span;
#pragma unroll
  for (int i = 0; i < kWalkStates; ++i) {
    out.da[(place * kWalkStates + i) * in.e + channel] = da[i];
    if (at.span == 0 && out.dh0 != nullptr) out.dh0[(at.row * in.e + channel) * kWalkStates + i] = r[i];
  }
  out.rows[place * 2 * in.e + channel] = dd;
  out.rows[(place * 2 + 1) * in.e + channel] = dbias;
}

}  // namespace

void walk_backward(SelectiveScanGrad& grad, const Tensor& dy, const Tensor& dfinal, const SelectiveScanInputs& given,
                   const Tensor& states) {
  SelectiveScanInputs in = given;
  in.x = walk_input(in.x);
  in.dt = walk_input(in.dt);
  const Tensor upstream = walk_input(dy);
  const int64_t b = in.x.size(0), l = in.x.size(1), e = in.x.size(2);
  const Device device = in.x.device();
  const Stream stream = current_stream(device);
  const ScanView<bf16> view = scan_view<bf16>(in);
  const bool wide = scan_rows_wide(in.B) && scan_rows_wide(in.C), gated = in.z.defined();
  const WalkSpans spans = walk_spans(in);
  const int64_t blocks = ceil_div(e, kWalkThreads);
  const LaunchConfig config{.grid = b * spans.count, .grid_y = blocks, .block = kWalkThreads, .stream = stream};
  WalkUpstream up{upstream.data<bf16>(), scan_pointer<float>(dfinal), nullptr};
  Tensor edges;
  if (spans.count > 1) {
    edges = empty({b, spans.count, kWalkStates, e}, DType::f32, device);
    const Tensor deltas = empty({b, spans.count, e}, DType::f32, device);
    launch(walk_reverse_kernel, config, edges.data<float>(), deltas.data<float>(), up, view, spans.length, spans.count,
           wide);
    launch(scan_chunks_kernel<true, bf16>,
           {.grid = ceil_div(e, 128), .grid_y = kWalkStates, .grid_z = b, .block = 128, .stream = stream},
           edges.data<float>(), nullptr, deltas.data<float>(), up.dfinal, view, spans.count, spans.length);
    up.received = edges.data<float>();
  }
  const Tensor da = empty({b * spans.count, kWalkStates, e}, DType::f32, device);
  const Tensor rows = empty({b * spans.count, 2, e}, DType::f32, device);
  const Tensor bc = empty({blocks, b, l, 2 * kWalkStates}, DType::f32, device);
  const WalkGradients out{grad.dx.data<bf16>(),
                          grad.ddt.data<bf16>(),
                          gated ? grad.dz.data<bf16>() : nullptr,
                          grad.y.defined() ? grad.y.data<bf16>() : nullptr,
                          gated ? grad.dz.stride(0) : 0,
                          gated ? grad.dz.stride(1) : 0,
                          da.data<float>(),
                          rows.data<float>(),
                          bc.data<float>(),
                          grad.dh0.defined() ? grad.dh0.data<float>() : nullptr};
  LaunchConfig main = config;
  main.shared = kShared;
  launch(gated && in.softplus ? walk_backward_kernel<true> : walk_backward_kernel<false>, main, out, up,
         reinterpret_cast<const uint4*>(states.data<bf16>()), view, spans.length, spans.count, wide);
  sum_scan_parts(grad, da, rows, bc);
}

}  // namespace krait::kernels::cuda

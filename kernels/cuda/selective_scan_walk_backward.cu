#include "kernels/cuda/selective_scan_walk.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kWalkWarps = kWalkThreads / 32;
constexpr int kWalkAhead = 4;                                           // positions whose inputs are loaded together
constexpr int kTile = 4;                                                // positions whose states are in registers
constexpr int kTiles = static_cast<int>(kScanChunk) / kTile;
constexpr int kKept = kTiles - 2;                                       // tiles whose first states are in shared memory
constexpr int64_t kShared = kScanChunk * 128                              // rows of B and C
                            + 2 * kWalkWarps * 512                        // sums of two tiles
                            + int64_t{kWalkWarps} * 4 * kTile * 64        // the next tile's inputs
                            + int64_t{kKept} * 2 * kWalkThreads * 16;     // first states, bf16

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

// Rows 0 to 7 of c (16, 8) += a (16, 8) b (8, 8) in tf32; rows 8 to 15 are nobody's. Lane 4 g + t holds of a: row g,
// columns t (a0) and t + 4 (a2); of b: rows t (b0) and t + 4 (b1), column g; of c: row g, columns 2t and 2t + 1.
// With a0 one in row j, a2 in row k: c's rows j and k += sums of b0 and b1 over four lanes. `any` fills a's other rows:
// registers that live anyway, so that no operand has to be put together.
__device__ __forceinline__ void add_rows(float (&c)[4], float a0, float a2, float any1, float any3, float b0, float b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(any1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(any3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

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

// The gradients of a span, from its last chunk to its first. A chunk is walked three times: forwards for the states
// before each tile of kTile positions (kept in bf16), then per tile forwards with the tile's states kept in registers,
// and backwards. Sums over the channels of a warp (dB, dC) are products with selecting matrices on the tensor cores,
// over warps in shared memory, over blocks in a second pass: no atomics. kUsual: with softplus and a gate, and no branch
// for either.
// Bound by the special functions, b l e (3 n + 8) of them at 16 a cycle and multiprocessor, and by the instructions,
// about as many: B32 E1536 L2048 1.6 ms at 1.7 GHz; three warps a scheduler do not hide every latency behind that.
template <bool kUsual>
__global__ void __launch_bounds__(kWalkThreads, 3)
    walk_backward_kernel(const WalkGradients out, const WalkUpstream up, const float* __restrict__ states,
                         const ScanView<bf16> in, int64_t length, int64_t spans, bool wide) {
  extern __shared__ float4 shared[];
  float4* rows = shared;                                            // (kScanChunk, 8)
  float2* sums = reinterpret_cast<float2*>(rows + kScanChunk * 8);  // (2 tiles, warps, dC or dB, 32)
  uint4* starts = reinterpret_cast<uint4*>(sums + 2 * kWalkWarps * 64);  // (kKept, 2, threads)
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  bf16* stage = reinterpret_cast<bf16*>(starts + kKept * 2 * kWalkThreads) + warp * 4 * kTile * 32;  // (4, kTile, 32)
  const WalkPlace at(in.e, in.l, length, spans);
  const int t1 = at.t1;
  const uint32_t channel = at.channel, e = static_cast<uint32_t>(in.e);
  const bool gated = kUsual || in.z != nullptr, softplus = kUsual || in.softplus;
  const int64_t chunks = (in.l + kScanChunk - 1) / kScanChunk, begin = at.row * in.l * in.e;
  const uint32_t z_row = static_cast<uint32_t>(in.z_row), dz_row = static_cast<uint32_t>(out.dz_row);
  bf16 *dx_out = out.dx + begin, *ddt_out = out.ddt + begin, *y_out = out.y + begin;
  bf16* dz_out = out.dz + at.row * out.dz_batch;
  const float bias = in.bias == nullptr ? 0.0f : in.bias[channel], d = in.d == nullptr ? 0.0f : in.d[channel];
  float* bc = out.bc + (int64_t{blockIdx.y} * (gridDim.x / spans) + at.row) * in.l * (2 * kWalkStates);

  // A lane copies 8 channels of position lane / 4 % 4 for its warp: of x or dt, and of dy or z.
  const uint32_t copied = at.warp_channel + lane % 4 * 8, copied_row = lane / 4 % 4;
  const bf16* copy_first = (lane < 16 ? in.x : in.dt) + begin;
  const bf16* copy_second = lane < 16 || !gated ? up.dy + begin : in.z + at.row * in.z_batch;
  const uint32_t second_row = lane < 16 || !gated ? e : z_row;
  bf16* copy_to = stage + (lane / 16 * kTile + copied_row) * 32 + lane % 4 * 8;
  const auto copy = [&](int from, bool both) {
    const uint32_t t = static_cast<uint32_t>(from) + copied_row;
    const bool valid = copied < e && static_cast<int>(t) < t1;
    walk_copy(copy_to, at_place(copy_first, t * e + copied), valid);
    if (both) walk_copy(copy_to + 2 * kTile * 32, at_place(copy_second, t * second_row + copied), valid);
    walk_commit();
  };
  const bf16* mine = stage + lane;  // x; dt, dy and z each kTile * 32 on

  float a[kWalkStates], r[kWalkStates], da[kWalkStates];
  float select[8];  // select[j]: one in row j of an accumulator
#pragma unroll
  for (int i = 0; i < 8; ++i) select[i] = lane / 4 == i ? 1.0f : 0.0f;
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

  for (int chunk = (t1 - 1) / static_cast<int>(kScanChunk), next = 0; chunk * kScanChunk >= at.t0; --chunk, next = 1) {
    const int first = chunk * static_cast<int>(kScanChunk);
    const int tiles = ((t1 - first < kScanChunk ? t1 - first : static_cast<int>(kScanChunk)) + kTile - 1) / kTile;
    if (next == 0) copy(first, tiles == 1);  // later chunks' first copy is under way
    keep_state_rows(rows, fetch_state_rows(in, at.row, first, t1, wide));
    keep_state_rows(rows + kWalkRows * 8, fetch_state_rows(in, at.row, first + kWalkRows, t1, wide));
    uint32_t begins[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      begins[i] = __ballot_sync(0xFFFFFFFFu, in.begins(at.row, int64_t{first} + 32 * i + lane));
    __syncthreads();
    const auto marks_of = [&](int tile) { return (tile < kTiles / 2 ? begins[0] : begins[1]) >> (tile % 8 * kTile); };

    const float* start = states + (at.row * chunks + chunk) * kWalkStates * in.e + channel;
    float h[kWalkStates];
#pragma unroll
    for (int i = 0; i < kWalkStates; ++i) h[i] = start[i * in.e];
#pragma unroll 1
    for (int tile = 0; tile + 1 < tiles; ++tile) {
      const uint32_t marks = marks_of(tile);
      float delta[kTile], dx[kTile];
      walk_wait<0>();
      __syncwarp();
#pragma unroll
      for (int s = 0; s < kTile; ++s) {
        const float raw = staged(mine + (kTile + s) * 32) + bias;
        delta[s] = softplus ? walk_softplus(raw) : raw;
        dx[s] = delta[s] * staged(mine + s * 32);
      }
      __syncwarp();
      copy(first + (tile + 1) * kTile, tile + 2 == tiles);
#pragma unroll
      for (int s = 0; s < kTile; ++s) {
        const float forget = forgetting(marks, s);
        const float4* row = rows + (tile * kTile + s) * 8;
#pragma unroll
        for (int q = 0; q < kWalkStates / 4; ++q) {
          const float4 b = row[q];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int i = 4 * q + j;
            h[i] = fmaf(scan_exp2(fmaf(delta[s], a[i], forget)), h[i], dx[s] * state_of(b, j));
          }
        }
      }
      if (tile + 2 < tiles) {
        uint4* to = starts + tile * 2 * kWalkThreads + tid;
        to[0] = {pack_pair(h[0], h[1]), pack_pair(h[2], h[3]), pack_pair(h[4], h[5]), pack_pair(h[6], h[7])};
        to[kWalkThreads] = {pack_pair(h[8], h[9]), pack_pair(h[10], h[11]), pack_pair(h[12], h[13]),
                            pack_pair(h[14], h[15])};
      }
    }

#pragma unroll 1
    for (int tile = tiles - 1; tile >= 0; --tile) {
      const int from = first + tile * kTile;
      const uint32_t marks = marks_of(tile);
      float delta[kTile], value[kTile], g[kTile];
      walk_wait<0>();
      __syncwarp();

      if (tile == 0) {
#pragma unroll
        for (int i = 0; i < kWalkStates; ++i) h[i] = start[i * in.e];
      } else if (tile + 1 < tiles) {
        const uint4* kept = starts + (tile - 1) * 2 * kWalkThreads + tid;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 v = kept[half * kWalkThreads];
          const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            h[8 * half + 2 * j] = low_half(words[j]);
            h[8 * half + 2 * j + 1] = high_half(words[j]);
          }
        }
      }

      const int limit = at.active ? t1 : 0;
      const uint32_t first_place = static_cast<uint32_t>(from) * e + channel;
      float seen[kTile][kWalkStates];  // states after each position; the last one's are not used after this loop
      float2* kept_sums = sums + (tile % 2 * kWalkWarps + warp) * 64 + lane;
      float tile_c[4] = {};  // rows 2 s + state / 8, columns state % 8
#pragma unroll
      for (int s = 0; s < kTile; ++s) {
        const float raw = staged(mine + (kTile + s) * 32) + bias;  // zeros were copied from t1 on
        value[s] = staged(mine + s * 32);
        delta[s] = softplus ? walk_softplus(raw) : raw;
        if (from + s >= t1) delta[s] = 0;
        const Gate gate(staged(mine + (2 * kTile + s) * 32), gated ? staged(mine + (3 * kTile + s) * 32) : 0.0f, gated);
        g[s] = gate.g;
        const float dx = delta[s] * value[s], forget = forgetting(marks, s);
        const float4* row = rows + (tile * kTile + s) * 8;
        float u[2] = {d * value[s], 0}, of_c[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float in_c[4] = {};  // rows: states; columns: sums over four lanes
#pragma unroll
          for (int q = 2 * half; q < 2 * half + 2; ++q) {
            const float4 b = row[q], c = row[4 + q];
            float to_c[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int i = 4 * q + j;
              const float before = s > 0 ? seen[s > 0 ? s - 1 : 0][i] : h[i];
              seen[s][i] = fmaf(scan_exp2(fmaf(delta[s], a[i], forget)), before, dx * state_of(b, j));
              u[j % 2] = fmaf(state_of(c, j), seen[s][i], u[j % 2]);
              to_c[j] = g[s] * seen[s][i];
            }
            const int k = 4 * (q % 2);
            add_rows(in_c, select[k], select[k + 1], a[k], a[k + 1], to_c[0], to_c[1]);
            add_rows(in_c, select[k + 2], select[k + 3], a[k + 2], a[k + 3], to_c[2], to_c[3]);
          }
          of_c[half] = in_c[0] + in_c[1];
        }
        add_rows(tile_c, select[2 * s], select[2 * s + 1], a[2 * s], a[2 * s + 1], of_c[0], of_c[1]);
        const float pre = u[0] + u[1];
        const bool real = from + s < limit;
        if (gated)
          store_if(real, at_place(dz_out, static_cast<uint32_t>(from + s) * dz_row + channel), gate.of_u * pre);
        store_if(real && out.y != nullptr, at_place(y_out, first_place + s * e), gate.silu * pre);
      }
      kept_sums[0] = {tile_c[0], tile_c[1]};

      // The compiler would keep this tile's exponentials, B and C and spill them: after a shuffle and a warp barrier it
      // cannot know that they are the same.
#pragma unroll
      for (int s = 0; s < kTile; ++s) delta[s] = __shfl_sync(0xFFFFFFFFu, delta[s], lane);
      __syncwarp();
      if (tile > 0)
        copy(from - kTile, true);
      else if (first > at.t0)
        copy(first - static_cast<int>(kScanChunk), false);

      float tile_b[4] = {};
#pragma unroll
      for (int s = kTile - 1; s >= 0; --s) {
        const float dx = delta[s] * value[s], forget = forgetting(marks, s);
        const float4* row = rows + (tile * kTile + s) * 8;
        float lambda_b[2] = {}, exponent[2] = {}, of_b[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float in_b[4] = {};
#pragma unroll
          for (int q = 2 * half; q < 2 * half + 2; ++q) {
            const float4 b = row[q], c = row[4 + q];
            float to_b[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int i = 4 * q + j;
              const float lambda = fmaf(g[s], state_of(c, j), r[i]);
              r[i] = scan_exp2(fmaf(delta[s], a[i], forget)) * lambda;
              const float of_exponent =
                  s > 0 ? r[i] * seen[s > 0 ? s - 1 : 0][i] : lambda * fmaf(-dx, state_of(b, j), seen[0][i]);
              lambda_b[j % 2] = fmaf(lambda, state_of(b, j), lambda_b[j % 2]);
              exponent[j % 2] = fmaf(of_exponent, a[i], exponent[j % 2]);
              da[i] = fmaf(of_exponent, delta[s], da[i]);
              to_b[j] = lambda * dx;
            }
            const int k = 4 * (q % 2);
            add_rows(in_b, select[k], select[k + 1], a[k], a[k + 1], to_b[0], to_b[1]);
            add_rows(in_b, select[k + 2], select[k + 3], a[k + 2], a[k + 3], to_b[2], to_b[3]);
          }
          of_b[half] = in_b[0] + in_b[1];
        }
        add_rows(tile_b, select[2 * s], select[2 * s + 1], a[2 * s], a[2 * s + 1], of_b[0], of_b[1]);
        const float total = lambda_b[0] + lambda_b[1];
        float ddt = fmaf(exponent[0] + exponent[1], static_cast<float>(1.0 / kLog2E), value[s] * total);
        if (softplus) ddt *= walk_softplus_slope(delta[s]);
        const bool real = from + s < limit;
        store_if(real, at_place(dx_out, first_place + s * e), fmaf(delta[s], total, d * g[s]));
        store_if(real, at_place(ddt_out, first_place + s * e), ddt);
        dbias += real ? ddt : 0.0f;
        dd = fmaf(g[s], value[s], dd);
      }
      kept_sums[32] = {tile_b[0], tile_b[1]};

      if (tile % 2 != 0) continue;
      __syncthreads();
      // This thread's value of four positions: position tid / 32, dB or dC, state.
      const int which = tid / 16 % 2, state = tid % 16, line = tid / 32 * 2 + state / 8;
      const int word = (1 - which) * 64 + (line * 4 + state % 8 / 2) * 2 + state % 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = from + half * kTile + tid / 32;
        if (t >= t1) continue;
        const float* v = reinterpret_cast<const float*>(sums + half * kWalkWarps * 64) + word;
        float s = v[0];
#pragma unroll
        for (int w = 1; w < kWalkWarps; ++w) s += v[w * 128];
        bc[int64_t{t} * (2 * kWalkStates) + tid % 32] = s;
      }
      __syncthreads();
    }
  }
  walk_wait<0>();

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
  launch(gated && in.softplus ? walk_backward_kernel<true> : walk_backward_kernel<false>, main, out, up, states.data<float>(), view, spans.length, spans.count, wide);
  sum_scan_parts(grad, da, rows, bc);
}

}  // namespace krait::kernels::cuda

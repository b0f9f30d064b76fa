#pragma once
#include "kernels/cuda/flow_ring.cuh"

// What lies between the linear maps of a layer. Each reads what does not depend on the operation before, then waits for that.
namespace krait::kernels::cuda::flow::step {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Mamba: kScanLanes lanes a channel, each a state. Only d, B and C come from the operation before.
__device__ __forceinline__ void scan(int operation_at) {
  const StepOp& op = operation(operation_at);
  const ScanStep& a = op.scan;
  const Range own = share(int64_t{op.rows} * a.e);
  if (own.begin == own.end) return;
  const int group = worker() / kScanLanes, lane = worker() % kScanLanes, outputs = a.r + 2 * a.n;
  const int first_row = own.begin / a.e, values = ((own.end - 1) / a.e - first_row + 1) * outputs;
  const bool holds = lane < a.n;
  const Source xz = source_of(a.xz), dbc = source_of(a.dbc);
  float* const shared = reinterpret_cast<float*>(here().rows);  // d, B, C of the rows here
  for (int first = own.begin; first < own.end; first += kWorkers / kScanLanes) {
    const int at = first + group;
    const bool alive = at < own.end;  // the shuffles below want all lanes
    const int row = alive ? at / a.e : first_row, c = alive ? at % a.e : 0;
    float* const state = a.h + (int64_t{row} * a.e + c) * a.n + lane;
    const float dt_bias = a.dt_bias[c], D = a.D[c];
    const float h = holds ? __ldcg(state) : 0.0f, A_log = holds ? a.A_log[c * a.n + lane] : 0.0f;
    float weight[kScanRanks];
#pragma unroll
    for (int i = 0; i < kScanRanks; ++i) {
      const int j = lane + i * kScanLanes;
      weight[i] = j < a.r ? static_cast<float>(a.dt_proj[c * a.r + j]) : 0.0f;
    }
    const float x = await(xz, int64_t{row} * a.xz.row + c), gate = silu(await(xz, int64_t{row} * a.xz.row + a.e + c)), decay = __expf(A_log);
    if (first == own.begin) {
      for (int i = worker(); i < values; i += kWorkers) shared[i] = await(dbc, int64_t{first_row + i / outputs} * a.dbc.row + i % outputs);
      sync_workers();
    }
    const float* const d = shared + (row - first_row) * outputs;
    const float B = holds ? d[a.r + lane] : 0.0f, C = holds ? d[a.r + a.n + lane] : 0.0f;
    float dt = 0;
#pragma unroll
    for (int i = 0; i < kScanRanks; ++i)
      if (lane + i * kScanLanes < a.r) dt += weight[i] * d[lane + i * kScanLanes];
    dt = lanes_sum(dt, kScanLanes);
    const float delta = softplus(rounded(dt) + dt_bias);
    const float now = __expf(-delta * decay) * h + delta * B * x;
    const float sum = lanes_sum(now * C, kScanLanes);
    if (alive && lane == 0) give(a.y, row, c, (sum + D * x) * gate);
    if (alive && holds) *state = now;
  }
  sync_workers();  // before anybody's next values
}

__device__ __forceinline__ void touch_scan(const StepOp& op) {
  const ScanStep& a = op.scan;
  const Range own = share(int64_t{op.rows} * a.e);
  const int c = own.begin % a.e, count = min(own.end - own.begin, a.e - c);
  touch(a.h + int64_t{own.begin} * a.n, (own.end - own.begin) * a.n * int64_t{4});
  touch(a.A_log + c * a.n, count * a.n * int64_t{4});
  touch(a.dt_proj + c * a.r, count * a.r * int64_t{2});
  touch(a.dt_bias + c, count * int64_t{4});
  touch(a.D + c, count * int64_t{4});
}

// Mamba-2: kStateLanes lanes a channel of a head. B and C of the rows that the block works on come through shared memory.
__device__ __forceinline__ void advance_state(int operation_at) {
  const StepOp& op = operation(operation_at);
  const StateStep& a = op.state;
  const int e = a.heads * a.p, mixed = 2 * a.groups * a.n;  // values of B and C of a row
  const Range own = share(int64_t{op.rows} * e);
  if (own.begin == own.end) return;
  const int first_row = own.begin / e, values = ((own.end - 1) / e - first_row + 1) * mixed;
  const int lane = worker() % kStateLanes;
  const Source in = source_of(a.zxbcdt);
  float* const bc = reinterpret_cast<float*>(here().rows);  // (rows here, 2 groups n)
  for (int first = own.begin; first < own.end; first += kWorkers / kStateLanes) {
    const int wanted = first + worker() / kStateLanes;
    const bool alive = wanted < own.end;  // the shuffles below want all lanes
    const int at = alive ? wanted : own.begin, row = at / e, c = at - row * e, head = c / a.p;
    float4 h[kStateQuads];
#pragma unroll
    for (int q = 0; q < kStateQuads; ++q) {
      const int j = (q * kStateLanes + lane) * 4;
      if (j < a.n) h[q] = __ldcg(reinterpret_cast<const float4*>(a.h + int64_t{at} * a.n + j));
    }
    const float dt_bias = a.dt_bias[head], rate = __expf(a.A_log[head]), D = a.D[a.D_columns == 1 ? head : c];
    if (first == own.begin)
      for (int i = worker(); i < values; i += kWorkers)
        bc[i] = await(in, int64_t{first_row + i / mixed} * a.zxbcdt.row + 2 * e + i % mixed);
    const int64_t from = int64_t{row} * a.zxbcdt.row + e;
    const float x = await(in, from + c), dt = fminf(fmaxf(softplus(await(in, from + e + mixed + head) + dt_bias), a.low), a.high);
    const float decay = __expf(-rate * dt), add = dt * x;
    if (first == own.begin) sync_workers();
    const float* const B = bc + (row - first_row) * mixed + head / (a.heads / a.groups) * a.n;
    const float* const C = B + a.groups * a.n;
    float sum = 0;
#pragma unroll
    for (int q = 0; q < kStateQuads; ++q) {
      const int j = (q * kStateLanes + lane) * 4;
      if (j >= a.n) continue;
      const float4 b = *reinterpret_cast<const float4*>(B + j), m = *reinterpret_cast<const float4*>(C + j);
      h[q] = {decay * h[q].x + add * b.x, decay * h[q].y + add * b.y, decay * h[q].z + add * b.z, decay * h[q].w + add * b.w};
      sum += h[q].x * m.x + h[q].y * m.y + h[q].z * m.z + h[q].w * m.w;
    }
    sum = lanes_sum(sum, kStateLanes);
    if (!alive) continue;
    if (lane == 0) give(a.u, row, c, sum + D * x);
#pragma unroll
    for (int q = 0; q < kStateQuads; ++q)
      if (const int j = (q * kStateLanes + lane) * 4; j < a.n) *reinterpret_cast<float4*>(a.h + int64_t{at} * a.n + j) = h[q];
  }
  sync_workers();  // before anybody's next values
}

__device__ __forceinline__ void touch_state(const StepOp& op) {
  const StateStep& a = op.state;
  const Range own = share(int64_t{op.rows} * a.heads * a.p);
  touch(a.h + int64_t{own.begin} * a.n, (own.end - own.begin) * a.n * int64_t{4});
}

inline constexpr int kHeadColumns = 8, kMaxHeadDim = 256;  // columns of a head that a lane holds

struct AttentionShared {
  float q[kMaxHeadDim], k[kMaxHeadDim], v[kMaxHeadDim];
  float o[kWarps][kMaxHeadDim], m[kWarps], l[kWarps];
};
static_assert(sizeof(AttentionShared) <= kStepRowBytes);

// One column of a head after its rotation, rounded like the head.
__device__ __forceinline__ float turned(Source qkv, int64_t head, int c, int64_t position, const AttentionStep& a) {
  const float own = await(qkv, head + c);
  if (a.cos == nullptr || c >= 2 * a.half) return own;
  const int pair = a.interleaved != 0 ? c / 2 : c % a.half;
  const bool second = a.interleaved != 0 ? c % 2 == 1 : c >= a.half;
  const float other = await(qkv, head + (a.interleaved != 0 ? c ^ 1 : (second ? c - a.half : c + a.half)));
  const float cosine = a.cos[position * a.half + pair], sine = a.sin[position * a.half + pair];
  return rounded(second ? other * sine + own * cosine : own * cosine - other * sine);
}

inline constexpr int kKeysAhead = 4;  // keys that a group reads before it looks at the first

// A query head of one row at a time; `lanes` neighbouring lanes share a key, the groups of lanes take keys in turn.
// Positions and the keys before them do not depend on the operation before.
__device__ __forceinline__ void attend(int operation_at) {
  const StepOp& op = operation(operation_at);
  const AttentionStep& a = op.attention;
  AttentionShared& shared = *reinterpret_cast<AttentionShared*>(here().rows);
  const Source qkv = source_of(a.qkv);
  const int d = a.d, lanes = a.lanes, group = worker() / lanes, groups = kWorkers / lanes;
  const int first = worker() % lanes * kHeadColumns, units = op.rows * a.hq, shared_by = a.hq / a.hkv;
  const bool holds = first < d;
  const int64_t pitch = int64_t{a.hkv} * d;
  uint4 keys[kKeysAhead] = {}, values[kKeysAhead] = {};
  const auto fetch = [&](int unit, int start, int p) {
    if (!holds) return;
    const int64_t base = (int64_t{unit / a.hq} * a.capacity) * pitch + unit % a.hq / shared_by * d + first;
#pragma unroll
    for (int i = 0; i < kKeysAhead; ++i) {
      const int j = start + i * groups + group;
      if (j >= p) continue;
      keys[i] = __ldcg(reinterpret_cast<const uint4*>(a.k_cache + base + j * pitch));
      values[i] = __ldcg(reinterpret_cast<const uint4*>(a.v_cache + base + j * pitch));
    }
  };
  const int own = static_cast<int>(blockIdx.x);
  if (own < units) fetch(own, 0, min(a.position[own / a.hq], a.capacity));
  for (int unit = own; unit < units; unit += static_cast<int>(gridDim.x)) {
    const int b = unit / a.hq, head = unit % a.hq, kv = head / shared_by, p = a.position[b];
    const int64_t row = int64_t{b} * a.qkv.row;
    if (p < 0 || p >= a.capacity) {
      for (int c = worker(); c < d; c += kWorkers) give(a.o, b, head * d + c, NAN);
      continue;
    }
    for (int at = worker(); at < 3 * d; at += kWorkers) {
      const int part = at / d, c = at - part * d;
      const float value = part == 0   ? turned(qkv, row + int64_t{head} * d, c, p, a) * a.scale
                          : part == 1 ? turned(qkv, row + int64_t{a.hq + kv} * d, c, p, a)
                                      : await(qkv, row + int64_t{a.hq + a.hkv + kv} * d + c);
      (part == 0 ? shared.q : part == 1 ? shared.k : shared.v)[c] = value;
      if (part > 0 && head % shared_by == 0)  // the others read the new position from their own copy
        (part == 1 ? a.k_cache : a.v_cache)[(int64_t{b} * a.capacity + p) * pitch + int64_t{kv} * d + c] = static_cast<bf16>(value);
    }
    sync_workers();
    float query[kHeadColumns], sum[kHeadColumns] = {}, m = -INFINITY, l = 0;
#pragma unroll
    for (int c = 0; c < kHeadColumns; ++c) query[c] = holds ? shared.q[first + c] : 0.0f;
    const float slope = a.alibi != nullptr ? a.alibi[head] : 0.0f;
    // All groups go round together: the shuffles need whole warps.
    for (int start = 0; start <= p; start += groups * kKeysAhead) {
      if (start > 0 || unit != own) fetch(unit, start, p);
#pragma unroll
      for (int i = 0; i < kKeysAhead; ++i) {
        if (start + i * groups > p) break;
        const int j = start + i * groups + group;
        float key[kHeadColumns], value[kHeadColumns], s = 0;
        unpack8(key, keys[i]);
        unpack8(value, values[i]);
        if (holds && j == p) {
#pragma unroll
          for (int c = 0; c < kHeadColumns; ++c) {
            key[c] = shared.k[first + c];
            value[c] = shared.v[first + c];
          }
        }
#pragma unroll
        for (int c = 0; c < kHeadColumns; ++c) s = fmaf(query[c], key[c], s);
        s = lanes_sum(s, lanes);
        if (j > p) continue;
        s -= slope * static_cast<float>(p - j);
        const float now = fmaxf(m, s), shrink = __expf(m - now), weight = __expf(s - now);
        m = now;
        l = l * shrink + weight;
#pragma unroll
        for (int c = 0; c < kHeadColumns; ++c) sum[c] = sum[c] * shrink + weight * value[c];
      }
    }
    // The groups of a warp, then the warps.
    for (int offset = lanes; offset < 32; offset *= 2) {
      const float other_m = __shfl_xor_sync(0xffffffffu, m, offset), other_l = __shfl_xor_sync(0xffffffffu, l, offset);
      const float top = fmaxf(m, other_m);
      const float own = m == -INFINITY ? 0.0f : __expf(m - top), other = other_m == -INFINITY ? 0.0f : __expf(other_m - top);
      m = top;
      l = l * own + other_l * other;
#pragma unroll
      for (int c = 0; c < kHeadColumns; ++c) sum[c] = sum[c] * own + __shfl_xor_sync(0xffffffffu, sum[c], offset) * other;
    }
    if (lane_of() == 0) {
      shared.m[warp_of()] = m;
      shared.l[warp_of()] = l;
    }
    if (holds && lane_of() < lanes)
#pragma unroll
      for (int c = 0; c < kHeadColumns; ++c) shared.o[warp_of()][first + c] = sum[c];
    sync_workers();
    float top = -INFINITY;
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, shared.m[w]);
    for (int c = worker(); c < d; c += kWorkers) {
      float whole = 0, total = 0;
      for (int w = 0; w < kWarps; ++w) {
        if (shared.m[w] == -INFINITY) continue;
        const float factor = __expf(shared.m[w] - top);
        whole += shared.o[w][c] * factor;
        total += shared.l[w] * factor;
      }
      give(a.o, b, head * d + c, whole / total);
    }
    sync_workers();  // before the next head's values
  }
}

__device__ __forceinline__ void touch_caches(const StepOp& op) {
  const AttentionStep& a = op.attention;
  const int64_t pitch = int64_t{a.hkv} * a.d;
  for (int b = 0; b < op.rows; ++b) {
    const int64_t count = min(static_cast<int64_t>(max(a.position[b], 0)), static_cast<int64_t>(a.capacity)) * pitch;
    touch_share(a.k_cache + b * a.capacity * pitch, count);
    touch_share(a.v_cache + b * a.capacity * pitch, count);
  }
}

#endif

}  // namespace krait::kernels::cuda::flow::step

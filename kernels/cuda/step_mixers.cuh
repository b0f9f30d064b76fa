#pragma once
#include "kernels/cuda/step_ring.cuh"

// What lies between the linear maps of a layer. Each waits for the operation before once, after having read what does not
// depend on it.
namespace krait::kernels::cuda::step {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ float softplus(float v) { return v > 20.0f ? v : log1pf(expf(v)); }

// A channel of a convolution of four taps: what does not depend on the new position.
struct Channel {
  uint2 weight;
  float bias, past[3];
  __device__ __forceinline__ void fetch(const bf16* before, const bf16* weights, const bf16* biases, int c, int channels) {
    weight = *reinterpret_cast<const uint2*>(weights + 4 * c);
#pragma unroll
    for (int j = 0; j < 3; ++j) past[j] = fresh(before + j * channels + c);
    bias = biases != nullptr ? static_cast<float>(biases[c]) : 0.0f;
  }
  __device__ __forceinline__ float mix(float now) const {
    float p = bias + __uint_as_float(weight.x << 16) * past[0];
    p += __uint_as_float(weight.x & 0xffff0000u) * past[1];
    p += __uint_as_float(weight.y << 16) * past[2];
    return rounded(silu(p + __uint_as_float(weight.y & 0xffff0000u) * now));
  }
};

// Mamba: kScanLanes lanes a channel, each a state. Only d, B and C come from the operation before.
__device__ __noinline__ void scan(int operation_at) {
  Shared& shared = here();
  const StepOp& op = operation(operation_at);
  const ScanStep& a = op.scan;
  const Range own = share(int64_t{op.rows} * a.e);
  const int group = worker() / kScanLanes, lane = worker() % kScanLanes;
  const bool holds = lane < a.n;
  bool waited = false;
  for (int first = own.begin; first < own.end || !waited; first += kWorkers / kScanLanes) {
    const int at = first + group;
    const bool alive = at < own.end;  // the shuffles below want all lanes
    const int row = alive ? at / a.e : 0, c = alive ? at % a.e : 0;
    const bf16* const xz = a.xz + int64_t{row} * 2 * a.e;
    bf16* const conv = a.conv + int64_t{row} * 3 * a.e;
    float* const state = a.h + (int64_t{row} * a.e + c) * a.n + lane;
    Channel channel;
    channel.fetch(conv, a.conv_weight, a.conv_bias, c, a.e);
    const float raw = fresh(xz + c), z = fresh(xz + a.e + c), dt_bias = a.dt_bias[c], D = a.D[c];
    const float h = holds ? __ldcg(state) : 0.0f, A_log = holds ? a.A_log[c * a.n + lane] : 0.0f;
    float weight[kScanRanks];
#pragma unroll
    for (int i = 0; i < kScanRanks; ++i) {
      const int j = lane + i * kScanLanes;
      weight[i] = j < a.r ? static_cast<float>(a.dt_proj[c * a.r + j]) : 0.0f;
    }
    const float x = channel.mix(raw), decay = __expf(A_log);
    if (!waited) wait(shared);
    waited = true;
    const bf16* const dbc = a.dbc + int64_t{row} * (a.r + 2 * a.n);
    const float B = holds ? fresh(dbc + a.r + lane) : 0.0f, C = holds ? fresh(dbc + a.r + a.n + lane) : 0.0f;
    float d[kScanRanks], dt = 0;
#pragma unroll
    for (int i = 0; i < kScanRanks; ++i)
      d[i] = lane + i * kScanLanes < a.r ? fresh(dbc + lane + i * kScanLanes) : 0.0f;
#pragma unroll
    for (int i = 0; i < kScanRanks; ++i) dt += weight[i] * d[i];
    dt = lanes_sum(dt, kScanLanes);
    const float delta = softplus(rounded(dt) + dt_bias);
    const float now = __expf(-delta * decay) * h + delta * B * x;
    if (alive && holds) *state = now;
    const float sum = lanes_sum(now * C, kScanLanes);  // and all lanes have read the convolution's state
    if (!alive || lane != 0) continue;
    a.y[int64_t{row} * a.e + c] = static_cast<bf16>((sum + D * x) * silu(z));
    conv[c] = static_cast<bf16>(channel.past[1]);
    conv[a.e + c] = static_cast<bf16>(channel.past[2]);
    conv[2 * a.e + c] = static_cast<bf16>(raw);
  }
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

// Mamba-2: a warp a channel of a head. The block convolves the B and C of the rows that it works on.
__device__ __noinline__ void advance_state(int operation_at) {
  Shared& shared = here();
  const StepOp& op = operation(operation_at);
  const StateStep& a = op.state;
  const int e = a.heads * a.p, mixed = 2 * a.groups * a.n;  // values of B and C of a row
  const Range own = share(int64_t{op.rows} * e);
  const int first_row = own.begin / e, last_row = own.begin < own.end ? (own.end - 1) / e : -1;
  const int values = (last_row - first_row + 1) * mixed;
  float* const bc = reinterpret_cast<float*>(shared.rows);  // (rows here, 2 groups n)

  struct Unit {  // a channel of this warp, and what of it does not depend on the operation before
    Channel channel;
    float h[4 * kStateQuads], dt_bias, A_log, D;
  };
  const auto fetch = [&](Unit& u, int at) {
    const int row = at / e, c = at % e, head = c / a.p;
#pragma unroll
    for (int q = 0; q < kStateQuads; ++q) {
      const int j = (q * 32 + lane_of()) * 4;
      float4 four = {0, 0, 0, 0};
      if (j < a.n) four = __ldcg(reinterpret_cast<const float4*>(a.h + int64_t{at} * a.n + j));
      u.h[4 * q] = four.x, u.h[4 * q + 1] = four.y, u.h[4 * q + 2] = four.z, u.h[4 * q + 3] = four.w;
    }
    u.channel.fetch(a.conv + int64_t{row} * 3 * a.channels, a.conv_weight, a.conv_bias, c, a.channels);
    u.dt_bias = a.dt_bias[head];
    u.A_log = a.A_log[head];
    u.D = a.D[a.D_columns == 1 ? head : c];
  };
  const auto fetch_mixed = [&](Channel& channel, int at) {
    channel.fetch(a.conv + int64_t{first_row + at / mixed} * 3 * a.channels, a.conv_weight, a.conv_bias, e + at % mixed, a.channels);
  };
  Unit unit;
  Channel channel;
  const int first = own.begin + warp_of();
  if (first < own.end) fetch(unit, first);
  if (worker() < values) fetch_mixed(channel, worker());
  wait(shared);
  float now = 0, raw = 0;  // of the first channel
  if (first < own.end) {
    const bf16* const in = a.zxbcdt + int64_t{first / e} * a.input + e;
    now = fresh(in + first % e);
    raw = fresh(in + a.channels + first % e / a.p);
  }
  for (int at = worker(); at < values; at += kWorkers) {
    if (at >= kWorkers) fetch_mixed(channel, at);
    bc[at] = channel.mix(fresh(a.zxbcdt + int64_t{first_row + at / mixed} * a.input + 2 * e + at % mixed));
  }
  sync_workers();
  for (int at = first; at < own.end; at += kWarps) {
    const int row = at / e, c = at % e, group = c / a.p / (a.heads / a.groups);
    if (at != first) {
      const bf16* const in = a.zxbcdt + int64_t{row} * a.input + e;
      fetch(unit, at);
      now = fresh(in + c);
      raw = fresh(in + a.channels + c / a.p);
    }
    const float x = unit.channel.mix(now), dt = fminf(fmaxf(softplus(raw + unit.dt_bias), a.low), a.high);
    const float decay = __expf(-__expf(unit.A_log) * dt), add = dt * x;
    const float* const B = bc + (row - first_row) * mixed + group * a.n;
    const float* const C = B + a.groups * a.n;
    float sum = 0;
#pragma unroll
    for (int q = 0; q < kStateQuads; ++q) {
      const int j = (q * 32 + lane_of()) * 4;
      if (j >= a.n) continue;
      const float4 b = *reinterpret_cast<const float4*>(B + j), m = *reinterpret_cast<const float4*>(C + j);
      const float4 next = {decay * unit.h[4 * q] + add * b.x, decay * unit.h[4 * q + 1] + add * b.y,
                           decay * unit.h[4 * q + 2] + add * b.z, decay * unit.h[4 * q + 3] + add * b.w};
      *reinterpret_cast<float4*>(a.h + int64_t{at} * a.n + j) = next;
      sum += next.x * m.x + next.y * m.y + next.z * m.z + next.w * m.w;
    }
    sum = lanes_sum(sum, 32);
    if (lane_of() == 0) a.u[at] = static_cast<bf16>(sum + unit.D * x);
  }
}

__device__ __forceinline__ void touch_state(const StepOp& op) {
  const StateStep& a = op.state;
  const Range own = share(int64_t{op.rows} * a.heads * a.p);
  touch(a.h + int64_t{own.begin} * a.n, (own.end - own.begin) * a.n * int64_t{4});
  touch_share(a.conv, int64_t{op.rows} * 3 * a.channels);
  touch_share(a.conv_weight, int64_t{4} * a.channels);
  touch_share(a.conv_bias, a.channels);
}

inline constexpr int kHeadColumns = 8, kMaxHeadDim = 256;  // columns of a head that a lane holds

struct AttentionShared {
  float q[kMaxHeadDim], k[kMaxHeadDim], v[kMaxHeadDim];
  float o[kWarps][kMaxHeadDim], m[kWarps], l[kWarps];
};
static_assert(sizeof(AttentionShared) <= kStepRowBytes);

// One column of a head after its rotation, rounded like the head.
__device__ __forceinline__ float turned(const bf16* head, int c, int64_t position, const AttentionStep& a) {
  const float own = fresh(head + c);
  if (a.cos == nullptr || c >= 2 * a.half) return own;
  const int pair = a.interleaved != 0 ? c / 2 : c % a.half;
  const bool second = a.interleaved != 0 ? c % 2 == 1 : c >= a.half;
  const float other = fresh(head + (a.interleaved != 0 ? c ^ 1 : (second ? c - a.half : c + a.half)));
  const float cosine = a.cos[position * a.half + pair], sine = a.sin[position * a.half + pair];
  return rounded(second ? other * sine + own * cosine : own * cosine - other * sine);
}

inline constexpr int kKeysAhead = 4;  // keys that a group reads before it looks at the first

// A query head of one row at a time; `lanes` neighbouring lanes share a key, the groups of lanes take keys in turn.
// Positions and the keys before them do not depend on the operation before.
__device__ __noinline__ void attend(int operation_at) {
  Shared& all = here();
  const StepOp& op = operation(operation_at);
  const AttentionStep& a = op.attention;
  AttentionShared& shared = *reinterpret_cast<AttentionShared*>(all.rows);
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
  wait(all);
  for (int unit = own; unit < units; unit += static_cast<int>(gridDim.x)) {
    const int b = unit / a.hq, head = unit % a.hq, kv = head / shared_by, p = a.position[b];
    const bf16* const row = a.qkv + b * a.qkv_row;
    bf16* const o = a.o + int64_t{unit} * d;
    if (p < 0 || p >= a.capacity) {
      for (int c = worker(); c < d; c += kWorkers) o[c] = static_cast<bf16>(NAN);
      continue;
    }
    for (int at = worker(); at < 3 * d; at += kWorkers) {
      const int part = at / d, c = at - part * d;
      const float value = part == 0   ? turned(row + int64_t{head} * d, c, p, a) * a.scale
                          : part == 1 ? turned(row + int64_t{a.hq + kv} * d, c, p, a)
                                      : fresh(row + int64_t{a.hq + a.hkv + kv} * d + c);
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
      o[c] = static_cast<bf16>(whole / total);
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

}  // namespace krait::kernels::cuda::step

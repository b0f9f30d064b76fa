#pragma once
#include "kernels/cuda/step_ring.cuh"

// What lies between the linear maps of a layer. Each waits for the operation before once, after having read what does not
// depend on it.
namespace krait::kernels::cuda::step {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ float softplus(float v) { return v > 20.0f ? v : log1pf(expf(v)); }

// A convolved channel c of `channels`; past lies (taps - 1, channels).
__device__ __forceinline__ float convolved(const bf16* past, const bf16* now, const bf16* weight, const bf16* bias, int c, int channels, int taps) {
  float p = bias != nullptr ? static_cast<float>(bias[c]) : 0.0f;
  for (int j = 0; j + 1 < taps; ++j) p += static_cast<float>(weight[c * taps + j]) * fresh(past + j * channels + c);
  p += static_cast<float>(weight[c * taps + taps - 1]) * fresh(now + c);
  return rounded(silu(p));
}

// Mamba: kScanLanes lanes a channel, each a state. Only d, B and C come from the operation before.
__device__ __noinline__ void scan(int operation_at) {
  Shared& shared = here();
  const StepOp& op = operation(operation_at);
  const ScanStep& a = op.scan;
  const Range own = share(int64_t{op.rows} * a.e);
  const int group = worker() / kScanLanes, lane = worker() % kScanLanes;
  bool waited = false;
  for (int first = own.begin; first < own.end || !waited; first += kWorkers / kScanLanes) {
    const int at = first + group;
    const bool alive = at < own.end;  // the shuffles below want all lanes
    const int row = alive ? at / a.e : 0, c = alive ? at % a.e : 0;
    const bf16* const xz = a.xz + int64_t{row} * 2 * a.e;
    bf16* const conv = a.conv + int64_t{row} * (a.taps - 1) * a.e;
    const float x = convolved(conv, xz, a.conv_weight, a.conv_bias, c, a.e, a.taps), z = fresh(xz + a.e + c), raw = fresh(xz + c);
    const bool holds = lane < a.n;
    float* const state = a.h + (int64_t{row} * a.e + c) * a.n + lane;
    const float h = holds ? __ldcg(state) : 0.0f, decay = holds ? expf(a.A_log[c * a.n + lane]) : 0.0f;
    const float dt_bias = a.dt_bias[c], D = a.D[c];
    float weight[kScanRanks];
#pragma unroll
    for (int i = 0; i < kScanRanks; ++i) {
      const int j = lane + i * kScanLanes;
      weight[i] = j < a.r ? static_cast<float>(a.dt_proj[c * a.r + j]) : 0.0f;
    }
    if (!waited) wait(shared);
    waited = true;
    const bf16* const dbc = a.dbc + int64_t{row} * (a.r + 2 * a.n);
    const float B = holds ? fresh(dbc + a.r + lane) : 0.0f, C = holds ? fresh(dbc + a.r + a.n + lane) : 0.0f;
    float dt = 0;
#pragma unroll
    for (int i = 0; i < kScanRanks; ++i)
      if (const int j = lane + i * kScanLanes; j < a.r) dt += weight[i] * fresh(dbc + j);
    dt = lanes_sum(dt, kScanLanes);
    const float delta = softplus(rounded(dt) + dt_bias);
    const float now = expf(-delta * decay) * h + delta * B * x;
    if (alive && holds) *state = now;
    const float sum = lanes_sum(now * C, kScanLanes);
    __syncwarp();  // all lanes have read the convolution's state
    if (!alive || lane != 0) continue;
    a.y[int64_t{row} * a.e + c] = static_cast<bf16>((sum + D * x) * silu(z));
    for (int j = 0; j + 2 < a.taps; ++j) conv[j * a.e + c] = static_cast<bf16>(fresh(conv + (j + 1) * a.e + c));
    if (a.taps > 1) conv[(a.taps - 2) * a.e + c] = static_cast<bf16>(raw);
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
  const bool any = own.begin < own.end;
  const int first_row = own.begin / e, last_row = any ? (own.end - 1) / e : -1;
  float* const bc = reinterpret_cast<float*>(shared.rows);  // (rows here, 2 groups n)
  const auto read = [&](float (&h)[4 * kStateQuads], int at) {
#pragma unroll
    for (int q = 0; q < kStateQuads; ++q) {
      const int j = (q * 32 + lane_of()) * 4;
      float4 four = {0, 0, 0, 0};
      if (at < own.end && j < a.n) four = __ldcg(reinterpret_cast<const float4*>(a.h + int64_t{at} * a.n + j));
      h[4 * q] = four.x, h[4 * q + 1] = four.y, h[4 * q + 2] = four.z, h[4 * q + 3] = four.w;
    }
  };
  float h[4 * kStateQuads];
  read(h, own.begin + warp_of());
  wait(shared);
  for (int at = worker(); at < (last_row - first_row + 1) * mixed; at += kWorkers) {
    const int row = first_row + at / mixed;
    bc[at] = convolved(a.conv + int64_t{row} * (a.taps - 1) * a.channels, a.zxbcdt + int64_t{row} * a.input + e, a.conv_weight,
                       a.conv_bias, e + at % mixed, a.channels, a.taps);
  }
  const bf16* past = nullptr;
  const bf16* in = nullptr;
  float x = 0, dt = 0, decay = 0;
  const auto inputs = [&](int at) {
    const int row = at / e, c = at % e, head = c / a.p;
    past = a.conv + int64_t{row} * (a.taps - 1) * a.channels;
    in = a.zxbcdt + int64_t{row} * a.input;
    x = convolved(past, in + e, a.conv_weight, a.conv_bias, c, a.channels, a.taps);
    dt = fminf(fmaxf(softplus(fresh(in + e + a.channels + head) + a.dt_bias[head]), a.low), a.high);
    decay = expf(-expf(a.A_log[head]) * dt);
  };
  if (own.begin + warp_of() < own.end) inputs(own.begin + warp_of());
  sync_workers();
  for (int at = own.begin + warp_of(); at < own.end; at += kWarps) {
    if (at != own.begin + warp_of()) {
      read(h, at);
      inputs(at);
    }
    const int row = at / e, c = at % e, group = c / a.p / (a.heads / a.groups);
    const float* const B = bc + (row - first_row) * mixed + group * a.n;
    const float* const C = B + a.groups * a.n;
    const float add = dt * x;
    float sum = 0;
#pragma unroll
    for (int q = 0; q < kStateQuads; ++q) {
      const int j = (q * 32 + lane_of()) * 4;
      if (j >= a.n) continue;
      const float4 b = *reinterpret_cast<const float4*>(B + j), m = *reinterpret_cast<const float4*>(C + j);
      const float4 now = {decay * h[4 * q] + add * b.x, decay * h[4 * q + 1] + add * b.y, decay * h[4 * q + 2] + add * b.z,
                          decay * h[4 * q + 3] + add * b.w};
      *reinterpret_cast<float4*>(a.h + int64_t{at} * a.n + j) = now;
      sum += now.x * m.x + now.y * m.y + now.z * m.z + now.w * m.w;
    }
    sum = lanes_sum(sum, 32);
    if (lane_of() == 0) a.u[at] = static_cast<bf16>(sum + a.D[a.D_columns == 1 ? c / a.p : c] * x);
  }
}

__device__ __forceinline__ void touch_state(const StepOp& op) {
  const StateStep& a = op.state;
  const Range own = share(int64_t{op.rows} * a.heads * a.p);
  touch(a.h + int64_t{own.begin} * a.n, (own.end - own.begin) * a.n * int64_t{4});
  touch_share(a.conv, int64_t{op.rows} * (a.taps - 1) * a.channels);
  touch_share(a.conv_weight, int64_t{a.taps} * a.channels);
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

// A query head of one row at a time; `lanes` neighbouring lanes share a key, the groups of lanes take keys in turn.
__device__ __noinline__ void attend(int operation_at) {
  Shared& all = here();
  const StepOp& op = operation(operation_at);
  const AttentionStep& a = op.attention;
  AttentionShared& shared = *reinterpret_cast<AttentionShared*>(all.rows);
  const int d = a.d, lanes = a.lanes, group = worker() / lanes, groups = kWorkers / lanes;
  const int first = worker() % lanes * kHeadColumns;
  const bool holds = first < d;
  const int64_t pitch = int64_t{a.hkv} * d;
  wait(all);
  for (int unit = static_cast<int>(blockIdx.x); unit < op.rows * a.hq; unit += static_cast<int>(gridDim.x)) {
    const int b = unit / a.hq, head = unit % a.hq, shared_by = a.hq / a.hkv, kv = head / shared_by;
    const bf16* const row = a.qkv + b * a.qkv_row;
    bf16* const o = a.o + int64_t{unit} * d;
    const int64_t p = a.position[b];
    if (p < 0 || p >= a.capacity) {
      for (int c = worker(); c < d; c += kWorkers) o[c] = static_cast<bf16>(NAN);
      continue;
    }
    const int64_t base = b * a.capacity * pitch + int64_t{kv} * d;
    for (int c = worker(); c < d; c += kWorkers) {
      shared.q[c] = turned(row + int64_t{head} * d, c, p, a) * a.scale;
      shared.k[c] = turned(row + int64_t{a.hq + kv} * d, c, p, a);
      shared.v[c] = fresh(row + int64_t{a.hq + a.hkv + kv} * d + c);
      if (head % shared_by == 0) {  // the others read the new position from their own copy
        a.k_cache[base + p * pitch + c] = static_cast<bf16>(shared.k[c]);
        a.v_cache[base + p * pitch + c] = static_cast<bf16>(shared.v[c]);
      }
    }
    sync_workers();
    float query[kHeadColumns], sum[kHeadColumns] = {}, m = -INFINITY, l = 0;
#pragma unroll
    for (int c = 0; c < kHeadColumns; ++c) query[c] = holds ? shared.q[first + c] : 0.0f;
    const float slope = a.alibi != nullptr ? a.alibi[head] : 0.0f;
    uint4 next_k = {0, 0, 0, 0}, next_v = {0, 0, 0, 0};
    const auto fetch = [&](int64_t j) {
      if (!holds || j >= p) return;
      next_k = __ldcg(reinterpret_cast<const uint4*>(a.k_cache + base + j * pitch + first));
      next_v = __ldcg(reinterpret_cast<const uint4*>(a.v_cache + base + j * pitch + first));
    };
    fetch(group);
    // All groups go round together: the shuffles need whole warps.
    for (int64_t start = 0; start <= p; start += groups) {
      const int64_t j = start + group;
      float key[kHeadColumns], value[kHeadColumns];
      unpack8(key, next_k);
      unpack8(value, next_v);
      fetch(j + groups);
      if (holds && j == p) {
#pragma unroll
        for (int c = 0; c < kHeadColumns; ++c) {
          key[c] = shared.k[first + c];
          value[c] = shared.v[first + c];
        }
      }
      float s = 0;
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

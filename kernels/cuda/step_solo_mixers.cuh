#pragma once
#include "kernels/cuda/step_solo_pairs.cuh"

// Steps of Mamba, Mamba-2 and attention for one row.
namespace krait::kernels::cuda::solo {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Mamba: sixteen lanes a channel, each a state. Only d, B and C come from the operation before.
__device__ __noinline__ void scan(int operation_at) {
  Shared& shared = here();
  const SoloScan& a = reinterpret_cast<const SoloOp*>(shared.ops)[operation_at].scan;
  sync_workers();  // the channels that the block has kept are there
  const Range own = even_range(a.e, a.each, static_cast<int>(blockIdx.x));
  float* const mixed = shared.mixed[warp_of()];
  const int lane = lane_of() % 16, values = a.r + 2 * a.n;
  bool waited = false;
#pragma unroll 1
  for (int at = 2 * warp_of(); at < own.end - own.begin; at += 2 * kWarps) {
    const int index = at + lane_of() / 16, c = own.begin + index;  // e and the shares are even
    const bool holds = lane < a.n;
    float* const state = a.h + int64_t{c} * a.n + lane;
    const float h = holds ? __ldcg(state) : 0.0f, A_log = holds ? a.A_log[c * a.n + lane] : 0.0f;
    const float dt_bias = a.dt_bias[c], D = a.D[c], x = shared.kept[0][index], z = shared.kept[1][index];
    float weight[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) weight[i] = lane + 16 * i < a.r ? static_cast<float>(a.dt_proj[c * a.r + lane + 16 * i]) : 0.0f;
    const float decay = __expf(A_log), open = silu(z);
    if (!waited) {
#pragma unroll 1
      for (int first = lane_of() * 4; first < values; first += 128) {
        Four in(a.dbc, first, true);
        await(in);
        *reinterpret_cast<float4*>(mixed + first) = {low_of(in.v.x), high_of(in.v.x), low_of(in.v.z), high_of(in.v.z)};
      }
      __syncwarp();
      waited = true;
    }
    float dt = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (16 * i < a.r && lane + 16 * i < a.r) dt += weight[i] * mixed[lane + 16 * i];
    dt = lanes_sum(dt, 16);
    const float B = holds ? mixed[a.r + lane] : 0.0f, C = holds ? mixed[a.r + a.n + lane] : 0.0f;
    const float delta = softplus(rounded(dt) + dt_bias);
    const float now = __expf(-delta * decay) * h + delta * B * x;
    if (holds) *state = now;
    const float sum = lanes_sum(now * C, 16), y = rounded((sum + D * x) * open), next = __shfl_down_sync(0xffffffffu, y, 16);
    if (lane_of() != 0) continue;
    give(a.slot + c / 2, packed(y, next));
    *reinterpret_cast<uint32_t*>(a.y + c) = packed(y, next);
  }
}

// Mamba-2: a warp a channel of a head, four states a lane, and four more.
__device__ __noinline__ void advance_state(int operation_at) {
  Shared& shared = here();
  const SoloState& a = reinterpret_cast<const SoloOp*>(shared.ops)[operation_at].state;
  sync_workers();  // the channels that the block has kept are there
  const Range own = even_range(a.e, a.each, static_cast<int>(blockIdx.x));
#pragma unroll 1
  for (int index = warp_of(); index < own.end - own.begin; index += kWarps) {
    const int c = own.begin + index, head = c / a.p;
    float4 h[2] = {};
#pragma unroll
    for (int q = 0; q < 2; ++q)
      if (const int j = (q * 32 + lane_of()) * 4; j < a.n) h[q] = __ldcg(reinterpret_cast<const float4*>(a.h + int64_t{c} * a.n + j));
    const float dt_bias = a.dt_bias[head], A = __expf(a.A_log[head]), D = a.D[a.D_columns == 1 ? head : c];
    const float x = shared.kept[0][index], z = shared.kept[1][index];
    Four time(a.mixed, (2 * a.n + head) / 4 * 4, true);
    float sum = 0, decay = 0, add = 0;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const int j = (q * 32 + lane_of()) * 4;
      Four B(a.mixed, j, j < a.n), C(a.mixed, a.n + j, j < a.n);
      if (q == 0) {
        await(B, C, time);
        const uint32_t two = (2 * a.n + head) % 4 < 2 ? time.v.x : time.v.z;
        const float dt = fminf(fmaxf(softplus((head % 2 == 0 ? low_of(two) : high_of(two)) + dt_bias), a.low), a.high);
        decay = __expf(-A * dt);
        add = dt * x;
      }
      if (j >= a.n) continue;
      if (q > 0) await(B, C);
      const float4 next = {decay * h[q].x + add * low_of(B.v.x), decay * h[q].y + add * high_of(B.v.x), decay * h[q].z + add * low_of(B.v.z),
                           decay * h[q].w + add * high_of(B.v.z)};
      *reinterpret_cast<float4*>(a.h + int64_t{c} * a.n + j) = next;
      sum += next.x * low_of(C.v.x) + next.y * high_of(C.v.x) + next.z * low_of(C.v.z) + next.w * high_of(C.v.z);
    }
    sum = lanes_sum(sum, 32);
    if (lane_of() != 0) continue;
    const float u = sum + D * x;
    give(a.slot + c, packed(u, z));
    a.u[c] = static_cast<bf16>(u);
  }
}

inline constexpr int kHeadColumns = 8, kKeysAhead = 5;  // columns of a head that a lane holds; keys that it reads ahead

// A head a block; `lanes` neighbouring lanes share a key, the groups of lanes take keys in turn.
__device__ __noinline__ void attend(int operation_at) {
  const SoloAttention& s = reinterpret_cast<const SoloOp*>(here().ops)[operation_at].attention;
  const AttentionStep& a = s.of;
  AttentionShared& shared = here().attention;
  const int head = static_cast<int>(blockIdx.x);
  if (head >= a.hq) return;
  const int d = a.d, lanes = a.lanes, shift = 31 - __clz(lanes), group = worker() >> shift, groups = kThreads >> shift, p = a.position[0];
  const int first = (worker() & (lanes - 1)) * kHeadColumns, shared_by = a.hq / a.hkv, kv = head / shared_by;
  const bool holds = first < d, fits = p >= 0 && p < a.capacity;
  const int64_t pitch = int64_t{a.hkv} * d, base = int64_t{kv} * d + first;
  uint4 keys[kKeysAhead] = {}, values[kKeysAhead] = {};
  const auto fetch = [&](int start) {
#pragma unroll
    for (int i = 0; i < kKeysAhead; ++i) {
      const int j = start + i * groups + group;
      if (!holds || !fits || j >= p) continue;
      keys[i] = __ldcg(reinterpret_cast<const uint4*>(a.k_cache + base + j * pitch));
      values[i] = __ldcg(reinterpret_cast<const uint4*>(a.v_cache + base + j * pitch));
    }
  };
  fetch(0);
  const int each = d / 4, part = (worker() >= each) + (worker() >= 2 * each) + (worker() >= 3 * each), column = worker() * 4 - part * d;  // 0: the query, 1: the key, 2: the value
  if (part < 3) {
    Four in(s.qkv, (part == 0 ? head : part == 1 ? a.hq + kv : a.hq + a.hkv + kv) * d + column, true);
    await(in);
    *reinterpret_cast<float4*>(shared.raw + part * d + column) = {low_of(in.v.x), high_of(in.v.x), low_of(in.v.z), high_of(in.v.z)};
  }
  sync_workers();
  const float* query_at = shared.raw;
  const float* key_at = shared.raw + d;
  if (a.cos != nullptr && fits) {
#pragma unroll 1
    for (int at = worker(); at < 2 * d; at += kThreads) {
      const int which = at >= d ? 1 : 0, c = at - which * d;
      const float* const raw = shared.raw + which * d;
      float v = raw[c];
      if (c < 2 * a.half) {
        const int pair = a.interleaved != 0 ? c / 2 : c >= a.half ? c - a.half : c;
        const bool second = a.interleaved != 0 ? c % 2 == 1 : c >= a.half;
        const float other = raw[a.interleaved != 0 ? c ^ 1 : (second ? c - a.half : c + a.half)];
        const float cosine = a.cos[int64_t{p} * a.half + pair], sine = a.sin[int64_t{p} * a.half + pair];
        v = rounded(second ? other * sine + v * cosine : v * cosine - other * sine);
      }
      shared.turned[at] = v;
    }
    sync_workers();
    query_at = shared.turned;
    key_at = shared.turned + d;
  }
  if (fits && head % shared_by == 0)  // the other heads read the new position from their own copy
#pragma unroll 1
    for (int at = worker(); at < 2 * d; at += kThreads) {
      const int which = at >= d ? 1 : 0, c = at - which * d;
      (which == 0 ? a.k_cache : a.v_cache)[int64_t{p} * pitch + int64_t{kv} * d + c] = static_cast<bf16>(which == 0 ? key_at[c] : shared.raw[2 * d + c]);
    }
  float query[kHeadColumns], sum[kHeadColumns] = {}, m = -INFINITY, l = 0;
#pragma unroll
  for (int c = 0; c < kHeadColumns; ++c) query[c] = holds ? query_at[first + c] * a.scale : 0.0f;
  const float slope = a.alibi != nullptr ? a.alibi[head] : 0.0f;
#pragma unroll 1
  for (int start = 0; start <= p; start += groups * kKeysAhead) {  // all groups together: the shuffles need whole warps
    if (start > 0) fetch(start);
    float score[kKeysAhead];
    float top = m;
#pragma unroll
    for (int i = 0; i < kKeysAhead; ++i) {
      const int j = start + i * groups + group;
      if (holds && j == p) {
        uint32_t k[4], v[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          k[c] = packed(key_at[first + 2 * c], key_at[first + 2 * c + 1]);
          v[c] = packed(shared.raw[2 * d + first + 2 * c], shared.raw[2 * d + first + 2 * c + 1]);
        }
        keys[i] = {k[0], k[1], k[2], k[3]};
        values[i] = {v[0], v[1], v[2], v[3]};
      }
      float key[kHeadColumns], t = 0;
      unpack8(key, keys[i]);
#pragma unroll
      for (int c = 0; c < kHeadColumns; ++c) t = fmaf(query[c], key[c], t);
      score[i] = t;
    }
#pragma unroll 1
    for (int offset = lanes / 2; offset > 0; offset /= 2)
#pragma unroll
      for (int i = 0; i < kKeysAhead; ++i) score[i] += __shfl_xor_sync(0xffffffffu, score[i], offset);
#pragma unroll
    for (int i = 0; i < kKeysAhead; ++i) {
      const int j = start + i * groups + group;
      score[i] = j <= p ? score[i] - slope * static_cast<float>(p - j) : -INFINITY;
      top = fmaxf(top, score[i]);
    }
    const float shrink = m == -INFINITY ? 0.0f : __expf(m - top);
    m = top;
    l *= shrink;
#pragma unroll
    for (int c = 0; c < kHeadColumns; ++c) sum[c] *= shrink;
#pragma unroll
    for (int i = 0; i < kKeysAhead; ++i) {
      const float weight = score[i] == -INFINITY ? 0.0f : __expf(score[i] - top);
      float value[kHeadColumns];
      unpack8(value, values[i]);
      l += weight;
#pragma unroll
      for (int c = 0; c < kHeadColumns; ++c) sum[c] = fmaf(weight, value[c], sum[c]);
    }
  }
  // The groups of a warp, then the warps.
  float top = m;
#pragma unroll 1
  for (int offset = lanes; offset < 32; offset *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
  const float own = m == -INFINITY ? 0.0f : __expf(m - top);
  l *= own;
#pragma unroll
  for (int c = 0; c < kHeadColumns; ++c) sum[c] *= own;
#pragma unroll 1
  for (int offset = lanes; offset < 32; offset *= 2) {
    l += __shfl_xor_sync(0xffffffffu, l, offset);
#pragma unroll
    for (int c = 0; c < kHeadColumns; ++c) sum[c] += __shfl_xor_sync(0xffffffffu, sum[c], offset);
  }
  if (lane_of() == 0) {
    shared.m[warp_of()] = top;
    shared.l[warp_of()] = l;
  }
  if (holds && lane_of() < lanes) {
    *reinterpret_cast<float4*>(&shared.o[warp_of()][first]) = {sum[0], sum[1], sum[2], sum[3]};
    *reinterpret_cast<float4*>(&shared.o[warp_of()][first + 4]) = {sum[4], sum[5], sum[6], sum[7]};
  }
  sync_workers();
  const int c = 2 * worker();
  if (c >= d) return;
  float most = -INFINITY;
#pragma unroll 1
  for (int w = 0; w < kWarps; ++w) most = fmaxf(most, shared.m[w]);
  float whole[2] = {}, all = 0;
#pragma unroll 2
  for (int w = 0; w < kWarps; ++w) {
    const float factor = shared.m[w] == -INFINITY ? 0.0f : __expf(shared.m[w] - most);
    const float2 two = *reinterpret_cast<const float2*>(&shared.o[w][c]);
    whole[0] += two.x * factor;
    whole[1] += two.y * factor;
    all += shared.l[w] * factor;
  }
  const float inverse = fits ? __fdividef(1.0f, all) : NAN;
  const uint32_t two = packed(whole[0] * inverse, whole[1] * inverse);
  give(s.slot + (head * d + c) / 2, two);
  *reinterpret_cast<uint32_t*>(a.o + head * d + c) = two;
}

#endif

}  // namespace krait::kernels::cuda::solo

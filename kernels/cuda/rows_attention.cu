#include "kernels/cuda/rows_attention.h"

#include <algorithm>

#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/cluster_launch.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/step_attention.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kRounds = 4;             // positions of a lane under way
constexpr int kSplits = 8;             // blocks of a cluster
constexpr int kOwnValues = 320 * 64;   // of a head's keys, that a block reads alone

// 16 bytes that a kernel in front may have written, where this stands; `to` stays as it is when not `inside`.
__device__ __forceinline__ void read_in_order(uint4& to, const bf16* from, bool inside) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n@p ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];\n}\n"
               : "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w)
               : "l"(from), "r"(static_cast<int>(inside))
               : "memory");
}

// A block: a row and kHeads query heads of one key head, with `splits` blocks a share of their positions. kLanes
// neighbouring lanes take a position, 8 columns each; keys of the next positions are read while values of these are added.
// Bound by reading the cache; with several heads a block, by their arithmetic.
template <int kLanes, int kHeads>
__global__ void __launch_bounds__(kThreads, kHeads == 1 ? 6 : kHeads == 2 ? 4 : 3) rows_attention_kernel(const __grid_constant__ StepAttention a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int kDim = 8 * kLanes, kGroups = 32 / kLanes, kSpan = kWarps * kGroups, kBatch = kRounds * kSpan;
  __shared__ __align__(16) float part_o[kWarps][kHeads * kDim];
  __shared__ float2 part_m[kWarps][kHeads];
  __shared__ __align__(16) float came_o[kSplits][kHeads * kDim];
  __shared__ __align__(8) float2 came_m[kSplits][kHeads];
  __shared__ __align__(8) uint64_t barrier;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32, group = lane / kLanes, first = lane % kLanes * 8;
  const int split = static_cast<int>(blockIdx.x) % a.splits, unit = static_cast<int>(blockIdx.x) / a.splits;
  const int ratio = a.hq / a.hkv, chunks = ratio / kHeads, chunk = unit % chunks, kv = unit / chunks % a.hkv, row = unit / chunks / a.hkv;
  const int head = kv * ratio + chunk * kHeads;
  const uint32_t arrivals = shared_address(&barrier);
  if (a.splits > 1 && tid == 0) {
    arrivals_init(arrivals);
    arrivals_expect(arrivals, static_cast<uint32_t>(a.splits * kHeads * (kDim + 2) * 4));
  }
  const int64_t pitch = int64_t{a.hkv} * kDim, base = int64_t{row} * a.capacity * pitch + int64_t{kv} * kDim + first;

  if (!a.ahead) wait_for_previous();
  const int p = __ldcg(a.position + row);
  const bool inside = p >= 0 && p < a.capacity;
  const int share = max(kOwnValues / kDim, (p + kSplits - 1) / kSplits);
  const int begin = inside ? min(p, split * share) : 0, end = inside ? min(p, begin + share) : 0;
  uint4 key[kRounds] = {}, value[kRounds] = {};
  const auto read = [&](uint4 (&to)[kRounds], const bf16* cache, int from) {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int j = from + r * kSpan + warp * kGroups + group;
      read_in_order(to[r], cache + base + j * pitch, j < end);
    }
  };
  read(key, a.k_cache, begin);
  read(value, a.v_cache, begin);
  float cosine[8], sine[8];
  if (a.cos != nullptr && inside && first < 2 * a.half) read_rotation(cosine, sine, a, p, first);
  if (a.splits > 1) cluster_barrier();
  if (a.ahead) wait_for_previous();
  let_next_begin();

  const bf16* const fresh = a.qkv + row * a.qkv_row;
  float q[kHeads][8], sum[kHeads][8] = {}, m[kHeads], l[kHeads] = {};
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    m[h] = -INFINITY;
    unpack8(q[h], turned(fresh + (head + h) * kDim, first, cosine, sine, a));
#pragma unroll
    for (int i = 0; i < 8; ++i) q[h][i] *= a.scale;
  }
  const auto score = [&](const float (&k)[8], int h) {
    float s = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) s = fmaf(q[h][i], k[i], s);
    return sum_lanes<kLanes>(s);
  };
  const auto add = [&](float weight, const float (&v)[8], int h) {
    l[h] += weight;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[h][i] = fmaf(weight, v[i], sum[h][i]);
  };
  if (split == 0 && warp == 0 && inside) {  // the newest position
    const uint4 new_key = turned(fresh + (a.hq + kv) * kDim, first, cosine, sine, a), new_value = read_fresh(fresh + (a.hq + a.hkv + kv) * kDim + first);
    if (group == 0 && chunk == 0) {  // other heads read it from their own copy
      *reinterpret_cast<uint4*>(a.k_cache + base + p * pitch) = new_key;
      *reinterpret_cast<uint4*>(a.v_cache + base + p * pitch) = new_value;
    }
    float k[8], v[8];
    unpack8(k, new_key);
    unpack8(v, new_value);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float s = score(k, h);
      if (group == 0) {
        m[h] = s;
        add(1, v, h);
      }
    }
  }
#pragma unroll 1
  for (int from = begin; from < end; from += kBatch) {
    float s[kHeads][kRounds];
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const bool there = from + r * kSpan + warp * kGroups + group < end;
      float k[8];
      unpack8(k, key[r]);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        s[h][r] = score(k, h);
        if (!there) s[h][r] = -INFINITY;
      }
    }
    read(key, a.k_cache, from + kBatch);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float top = m[h];
#pragma unroll
      for (int r = 0; r < kRounds; ++r) top = fmaxf(top, s[h][r]);
      const float shrink = weight_of(m[h], top);
      m[h] = top;
      l[h] *= shrink;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[h][i] *= shrink;
    }
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      float v[8];
      unpack8(v, value[r]);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) add(weight_of(s[h][r], m[h]), v, h);
    }
    read(value, a.v_cache, from + kBatch);
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {  // groups of the warp
    float top = m[h];
#pragma unroll
    for (int offset = kLanes; offset < 32; offset *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
    const float factor = weight_of(m[h], top);
    l[h] *= factor;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[h][i] *= factor;
#pragma unroll
    for (int offset = kLanes; offset < 32; offset *= 2) {
      l[h] += __shfl_xor_sync(0xffffffffu, l[h], offset);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[h][i] += __shfl_xor_sync(0xffffffffu, sum[h][i], offset);
    }
    if (group == 0) {
      float* const to = &part_o[warp][h * kDim + first];
      *reinterpret_cast<float4*>(to) = {sum[h][0], sum[h][1], sum[h][2], sum[h][3]};
      *reinterpret_cast<float4*>(to + 4) = {sum[h][4], sum[h][5], sum[h][6], sum[h][7]};
    }
    if (lane == 0) part_m[warp][h] = {top, l[h]};
  }
  __syncthreads();
  // Two columns of the sum over `count` parts, and what they were divided by.
  const auto join = [](const float2* ms, const float* values, int count, int values_pitch, float2& v, float& top) {
    float total = 0;
    top = -INFINITY;
    for (int i = 0; i < count; ++i) top = fmaxf(top, ms[i * kHeads].x);
    v = {0, 0};
    for (int i = 0; i < count; ++i) {
      const float2 ml = ms[i * kHeads], o = *reinterpret_cast<const float2*>(values + i * values_pitch);
      const float factor = weight_of(ml.x, top);
      total = fmaf(factor, ml.y, total);
      v = {fmaf(factor, o.x, v.x), fmaf(factor, o.y, v.y)};
    }
    return total;
  };
  constexpr int kPairs = kHeads * kDim / 2;
  bf16* const out = a.o + (int64_t{row} * a.hq + head) * kDim;
  const uint32_t there = a.splits > 1 ? of_block(arrivals, 0) : 0;
  for (int i = tid; i < kPairs; i += kThreads) {
    const int h = 2 * i / kDim;
    float2 v;
    float top;
    const float total = join(&part_m[0][h], &part_o[0][2 * i], kWarps, kHeads * kDim, v, top);
    if (a.splits == 1) {
      *reinterpret_cast<uint32_t*>(out + 2 * i) = pack(v.x / total, v.y / total);
      continue;
    }
    send(of_block(shared_address(&came_o[split][2 * i]), 0), there, v.x, v.y);
    if (2 * i % kDim == 0) send(of_block(shared_address(&came_m[split][h]), 0), there, top, total);
  }
  if (a.splits == 1 || split != 0) return;
  arrivals_wait(arrivals, 0);
  for (int i = tid; i < kPairs; i += kThreads) {
    float2 v;
    float top;
    const float total = join(&came_m[0][2 * i / kDim], &came_o[0][2 * i], a.splits, kHeads * kDim, v, top);
    *reinterpret_cast<uint32_t*>(out + 2 * i) = pack(v.x / total, v.y / total);
  }
#endif
}

template <int kLanes, int kHeads>
void start(const StepAttention& a, Stream stream) {
  const auto kernel = rows_attention_kernel<kLanes, kHeads>;
  const LaunchConfig config{.grid = int64_t{a.rows} * (a.hq / kHeads) * a.splits, .block = kThreads, .stream = stream};
  keep_shared_memory(kernel);
  if (a.splits > 1)
    launch_with({clusters_of(a.splits), overlapping()}, kernel, config, a);
  else
    launch_with({overlapping()}, kernel, config, a);
}

template <int kLanes>
void start(const StepAttention& a, Stream stream) {
  const int ratio = a.hq / a.hkv;
  if (ratio % 4 == 0) return start<kLanes, 4>(a, stream);
  if (ratio % 2 == 0) return start<kLanes, 2>(a, stream);
  start<kLanes, 1>(a, stream);
}

}  // namespace

void rows_attention(StepAttention a, Stream stream) {
  const int own = kOwnValues / a.d;
  a.splits = std::clamp((a.capacity + own - 1) / own, 1, kSplits);
  if (a.d == 64) return start<8>(a, stream);
  start<16>(a, stream);
}

}  // namespace krait::kernels::cuda

#include "kernels/cuda/few_attention.h"

#include "kernels/cuda/aligned.h"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/cluster_launch.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/step_attention.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kAhead = 4;  // positions of a lane that are read while the kernel in front still runs

// A cluster: a row and a head. kLanes neighbouring lanes share a position, 8 columns each; kRounds positions of a lane are
// read while the kernel in front still runs. Bound by latency, with long caches by reading them.
template <int kLanes, int kRounds>
__global__ void __launch_bounds__(kThreads) few_attention_kernel(const __grid_constant__ StepAttention a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr int kDim = 8 * kLanes, kGroups = 32 / kLanes, kSpan = kWarps * kGroups, kOwn = kDim / 32;  // kOwn: columns a lane joins
  __shared__ __align__(16) float part_o[kWarps][kDim];
  __shared__ float2 part_m[kWarps];
  __shared__ __align__(16) float came_o[kFewSplits][kDim];
  __shared__ __align__(8) float came_m[kFewSplits][2];
  __shared__ __align__(8) uint64_t barrier;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32, group = lane / kLanes, first = lane % kLanes * 8;
  const int split = static_cast<int>(blockIdx.x) % a.splits, pair = static_cast<int>(blockIdx.x) / a.splits;
  const int row = pair / a.hq, head = pair % a.hq, kv = head / (a.hq / a.hkv);
  const uint32_t arrivals = shared_address(&barrier);
  if (a.early) let_next_begin();
  if (tid == 0) {
    arrivals_init(arrivals);
    arrivals_expect(arrivals, static_cast<uint32_t>(a.splits * (kDim + 2) * 4));
  }
  const int64_t pitch = int64_t{a.hkv} * kDim, base = int64_t{row} * a.capacity * pitch + int64_t{kv} * kDim + first;

  if (!a.ahead) wait_for_previous();
  const int p = __ldcg(a.position + row);
  const bool inside = p >= 0 && p < a.capacity;
  // How many blocks share them follows the position alone, so that sums do not change with the capacity.
  constexpr int kShare = kFewShare / kDim;
  const int share = p <= kFewestSplits * kShare ? (p + kFewestSplits - 1) / kFewestSplits : max(kShare, (p + kFewSplits - 1) / kFewSplits);
  const int begin = min(p, split * share), end = inside ? min(p, begin + share) : 0;
  uint4 key[kRounds], value[kRounds];
  const auto read = [&](int from) {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      const int j = from + r * kSpan + warp * kGroups + group;
      key[r] = j < end ? read_fresh(a.k_cache + base + j * pitch) : uint4{0, 0, 0, 0};
      value[r] = j < end ? read_fresh(a.v_cache + base + j * pitch) : uint4{0, 0, 0, 0};
    }
  };
  read(begin);
  float cosine[8], sine[8];
  if (a.cos != nullptr && inside && first < 2 * a.half) read_rotation(cosine, sine, a, p, first);
  cluster_barrier();
  if (a.ahead) wait_for_previous();
  if (!a.early) let_next_begin();

  const bf16* const fresh = a.qkv + row * a.qkv_row;
  float q[8], sum[8] = {}, m = -INFINITY, l = 0;
  unpack8(q, turned(fresh + head * kDim, first, cosine, sine, a));
  const bool newest = split == 0 && warp == 0 && inside;  // the same for a whole warp
  uint4 new_key = {0, 0, 0, 0}, new_value = {0, 0, 0, 0};
  if (newest) {
    new_key = turned(fresh + (a.hq + kv) * kDim, first, cosine, sine, a);
    new_value = read_fresh(fresh + (a.hq + a.hkv + kv) * kDim + first);
    if (group == 0 && head % (a.hq / a.hkv) == 0) {  // the others read the new position from their own copy
      *reinterpret_cast<uint4*>(a.k_cache + base + p * pitch) = new_key;
      *reinterpret_cast<uint4*>(a.v_cache + base + p * pitch) = new_value;
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) q[i] *= a.scale;
  const auto score = [&](uint4 packed) {
    float k[8], s = 0;
    unpack8(k, packed);
#pragma unroll
    for (int i = 0; i < 8; ++i) s = fmaf(q[i], k[i], s);
    return sum_lanes<kLanes>(s);
  };
  const auto add = [&](float weight, uint4 packed) {
    float v[8];
    unpack8(v, packed);
    l += weight;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = fmaf(weight, v[i], sum[i]);
  };
  if (newest) {
    const float s = score(new_key);
    if (group == 0) {
      m = s;
      add(1, new_value);
    }
  }
#pragma unroll 1
  for (int from = begin; from < end; from += kRounds * kSpan) {
    if (from > begin) read(from);
    float s[kRounds], top = m;
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      s[r] = score(key[r]);
      if (from + r * kSpan + warp * kGroups + group >= end) s[r] = -INFINITY;
      top = fmaxf(top, s[r]);
    }
    const float shrink = weight_of(m, top);
    m = top;
    l *= shrink;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] *= shrink;
#pragma unroll
    for (int r = 0; r < kRounds; ++r) add(weight_of(s[r], top), value[r]);
  }
  {  // groups of the warp
    float top = m;
#pragma unroll
    for (int offset = kLanes; offset < 32; offset *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
    const float factor = weight_of(m, top);
    l *= factor;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] *= factor;
#pragma unroll
    for (int offset = kLanes; offset < 32; offset *= 2) {
      l += __shfl_xor_sync(0xffffffffu, l, offset);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], offset);
    }
    if (group == 0) {
      *reinterpret_cast<float4*>(&part_o[warp][first]) = {sum[0], sum[1], sum[2], sum[3]};
      *reinterpret_cast<float4*>(&part_o[warp][first + 4]) = {sum[4], sum[5], sum[6], sum[7]};
    }
    if (lane == 0) part_m[warp] = {top, l};
  }
  __syncthreads();
  // The block's warps joined, to the cluster's first block.
  if (warp == 0) {
    float top = -INFINITY, total = 0, v[kOwn] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, part_m[w].x);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 ml = part_m[w];
      const float factor = weight_of(ml.x, top);
      total = fmaf(factor, ml.y, total);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) v[i] = fmaf(factor, part_o[w][kOwn * lane + i], v[i]);
    }
    const uint32_t there = of_block(arrivals, 0);
    const uint32_t to = of_block(shared_address(&came_o[split][kOwn * lane]), 0);
    if constexpr (kOwn == 2)
      send(to, there, v[0], v[1]);
    else
      send(to, there, uint4{__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])});
    if (lane == 0) send(of_block(shared_address(&came_m[split][0]), 0), there, top, total);
  }
  if (split != 0) return;
  arrivals_wait(arrivals, 0);
  if (tid >= kDim) return;
  float top = -INFINITY, total = 0, v = 0;
  for (int s = 0; s < a.splits; ++s) top = fmaxf(top, came_m[s][0]);
  for (int s = 0; s < a.splits; ++s) {
    const float factor = weight_of(came_m[s][0], top);
    total = fmaf(factor, came_m[s][1], total);
    v = fmaf(factor, came_o[s][tid], v);
  }
  a.o[int64_t{pair} * kDim + tid] = static_cast<bf16>(v / total);
#endif
}

}  // namespace

StepAttention step_attention_of(Tensor& o, const Tensor& qkv, Tensor& k_cache, Tensor& v_cache, const Tensor& position, const AttentionAppend& a) {
  StepAttention work{};
  work.o = o.data<bf16>();
  work.k_cache = k_cache.data<bf16>();
  work.v_cache = v_cache.data<bf16>();
  work.qkv = qkv.data<bf16>();
  work.position = position.data<int32_t>();
  work.cos = pointer_or_null<float>(a.cos);
  work.sin = pointer_or_null<float>(a.sin);
  work.qkv_row = qkv.stride(0);
  work.capacity = static_cast<int>(k_cache.size(1));
  work.rows = static_cast<int>(qkv.size(0));
  work.hq = static_cast<int>(a.hq);
  work.hkv = static_cast<int>(a.hkv);
  work.d = static_cast<int>(qkv.size(2));
  work.half = a.cos.defined() ? static_cast<int>(a.cos.size(1)) : 0;
  work.interleaved = a.style == RopeStyle::interleaved;
  work.scale = static_cast<float>(a.scale);
  return work;
}

bool step_attention_fits(const StepAttention& a) {
  if (a.rows < 1 || a.hkv < 1 || a.hq % a.hkv != 0 || a.qkv_row % 8 != 0) return false;
  if (!aligned16(a.qkv, a.k_cache, a.v_cache)) return false;
  if (a.cos != nullptr && a.half % (a.interleaved ? 4 : 8) != 0) return false;
  return a.d == 64 || a.d == 128;
}

void few_attention(const StepAttention& a, Stream stream) {
  const auto kernel = a.d == 64 ? few_attention_kernel<8, kAhead> : few_attention_kernel<16, kAhead>;
  keep_shared_memory(kernel);
  launch_with({clusters_of(a.splits), overlapping()}, kernel, {.grid = int64_t{a.rows} * a.hq * a.splits, .block = kThreads, .stream = stream}, a);
}

}  // namespace krait::kernels::cuda

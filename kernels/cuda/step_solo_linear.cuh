#pragma once
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/step_solo_pairs.cuh"

// Linear maps of one row, with the norm, gate or copy in front and the convolution behind.
namespace krait::kernels::cuda::solo {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// Four inputs of a norm a thread; warps exchange the mean and the squares about it of their shares (Chan, Golub & LeVeque 1983).
__device__ __forceinline__ void normalise(const SoloLinear& l, bf16* row) {
  Shared& shared = here();
  const SoloNorm& a = l.norm;
  const int c = worker() * 4;
  const bool alive = c < l.k, writes = blockIdx.x == gridDim.x - 1;
  float4 weight = {0, 0, 0, 0}, bias = {0, 0, 0, 0};
  uint2 other = {0, 0};
  if (alive) {
    weight = *reinterpret_cast<const float4*>(a.w + c);
    if (a.b != nullptr) bias = *reinterpret_cast<const float4*>(a.b + c);
    if (a.holds != 0) other = *reinterpret_cast<const uint2*>(shared.held + c);
    if (a.residual != nullptr) other = __ldcg(reinterpret_cast<const uint2*>(a.residual + c));
  }
  Four in(l.x, c, alive);
  await(in);
  uint2 sum = {in.v.x, in.v.z};
  if (a.holds != 0 || a.residual != nullptr) {
    sum.x = packed(low_of(sum.x) + low_of(other.x), high_of(sum.x) + high_of(other.x));
    sum.y = packed(low_of(sum.y) + low_of(other.y), high_of(sum.y) + high_of(other.y));
  }
  if (alive) *reinterpret_cast<uint2*>(shared.held + c) = sum;
  float v[4] = {low_of(sum.x), high_of(sum.x), low_of(sum.y), high_of(sum.y)};
  const int warps = (l.k + 127) / 128;
  const int k = l.k;
  const auto count = [k](int warp) { return static_cast<float>(min(k - warp * 128, 128)); };
  float first = 0, second = 0;
  if (warp_of() < warps) {
    if (a.centred != 0) {
      first = __fdividef(lanes_sum((v[0] + v[1]) + (v[2] + v[3]), 32), count(warp_of()));
      if (alive)
#pragma unroll
        for (int i = 0; i < 4; ++i) second += (v[i] - first) * (v[i] - first);
    } else {
      second = (v[0] * v[0] + v[1] * v[1]) + (v[2] * v[2] + v[3] * v[3]);
    }
    second = lanes_sum(second, 32);
    if (lane_of() == 0) shared.statistics[warp_of()] = make_float2(first, second);
  }
  sync_workers();
  if (warp_of() >= warps) return;
  const int w = lane_of() % kWarps;
  float2 own = {0, 0};
  if (w < warps) own = shared.statistics[w];
  const float inverse = __fdividef(1.0f, static_cast<float>(l.k));
  float mu = 0;
  if (a.centred != 0) {
    const float n = w < warps ? count(w) : 0.0f;
    mu = lanes_sum(n * own.x, kWarps) * inverse;
    own.y += n * (own.x - mu) * (own.x - mu);
  }
  const float scale = rsqrtf(lanes_sum(own.y, kWarps) * inverse + a.eps);
  if (!alive) return;
  v[0] = (v[0] - mu) * scale * weight.x + bias.x;
  v[1] = (v[1] - mu) * scale * weight.y + bias.y;
  v[2] = (v[2] - mu) * scale * weight.z + bias.z;
  v[3] = (v[3] - mu) * scale * weight.w + bias.w;
  const uint2 y = {packed(v[0], v[1]), packed(v[2], v[3])};
  *reinterpret_cast<uint2*>(row + c) = y;
  if (!writes) return;
  *reinterpret_cast<uint2*>(a.y + c) = y;
  if (a.sum != nullptr) *reinterpret_cast<uint2*>(a.sum + c) = sum;
  if (c == 0) {
    if (a.mean != nullptr) *a.mean = mu;
    *a.rstd = scale;
  }
}

// Mamba-2's gated norm: a thread has two channels, and two more.
__device__ __forceinline__ void gate(const SoloLinear& l, bf16* row) {
  Shared& shared = here();
  const SoloGate& a = l.gate;
  const int c[2] = {worker() * 2, (worker() + kThreads) * 2};
  float2 weight[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (c[i] < l.k) weight[i] = *reinterpret_cast<const float2*>(a.w + c[i]);
  Four in[2] = {{l.x, 2 * c[0], c[0] < l.k}, {l.x, 2 * c[1], c[1] < l.k}};
  await(in[0], in[1]);
  float v[4], s = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t both = i % 2 == 0 ? in[i / 2].v.x : in[i / 2].v.z;
    const float u = low_of(both), gated = u * silu(high_of(both)), counted = a.norm_first != 0 ? u : gated;
    s += counted * counted;
    v[i] = gated;
  }
  s = lanes_sum(s, 32);
  if (lane_of() == 0) shared.statistics[warp_of()].y = s;
  sync_workers();
  const float scale = rsqrtf(lanes_sum(shared.statistics[lane_of() % kWarps].y, kWarps) * __fdividef(1.0f, static_cast<float>(l.k)) + a.eps);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (c[i] >= l.k) continue;
    const uint32_t y = packed(v[2 * i] * (scale * weight[i].x), v[2 * i + 1] * (scale * weight[i].y));
    *reinterpret_cast<uint32_t*>(row + c[i]) = y;
    if (blockIdx.x == gridDim.x - 1) *reinterpret_cast<uint32_t*>(a.y + c[i]) = y;
  }
}

__device__ __forceinline__ void copy(const SoloLinear& l, bf16* row) {
  const int c = worker() * 4, d = c + 4 * kThreads;
  Four a(l.x, c, c < l.k), b(l.x, d, d < l.k);
  await(a, b);
  if (a.wanted) *reinterpret_cast<uint2*>(row + c) = {a.v.x, a.v.z};
  if (b.wanted) *reinterpret_cast<uint2*>(row + d) = {b.v.x, b.v.z};
}
static_assert(8 * kThreads >= kSoloWidth);

/// What follows a column of a map; the lower half of a warp has one, the upper half the next.
struct Finish {
  int segment, at, column;  // the how manyth of its segment in this block; column < 0: none
  float bias, tap_bias, past[3];
  uint2 taps;
  bool mixes;
  __device__ __forceinline__ void begin(const SoloLinear& l, const Range (&own)[3], int index) {
    segment = 0;
    column = -1;
    bias = 0;
    mixes = false;
    at = index;
    while (segment < 3 && at >= own[segment].end - own[segment].begin) at -= own[segment].end - own[segment].begin, ++segment;
    if (segment == 3) return;
    column = l.segment[segment].base + own[segment].begin + at;
    if (l.bias != nullptr) bias = static_cast<float>(l.bias[column]);
    if (l.conv == nullptr) return;
    const int c = column - l.conv_first;
    mixes = c >= 0 && c < l.channels;
    if (!mixes) return;
    taps = *reinterpret_cast<const uint2*>(l.conv_weight + 4 * c);
    tap_bias = l.conv_bias != nullptr ? static_cast<float>(l.conv_bias[c]) : 0.0f;
#pragma unroll
    for (int j = 0; j < 3; ++j) past[j] = fresh(l.conv + j * l.channels + c);
  }
  /// `sum` is the same in all lanes of the half.
  __device__ __forceinline__ void end(const SoloLinear& l, float sum) const {
    const float plain = rounded(activate_as(l.epilogue, sum + bias));
    float v = plain;
    if (mixes) {
      const float p = tap_bias + low_of(taps.x) * past[0] + high_of(taps.x) * past[1] + low_of(taps.y) * past[2];
      v = rounded(silu(p + high_of(taps.y) * plain));
    }
    const float next = __shfl_down_sync(0xffffffffu, v, 16), plain_next = __shfl_down_sync(0xffffffffu, plain, 16);
    const int partner = __shfl_down_sync(0xffffffffu, column, 16);
    if (lane_of() % 16 != 0 || column < 0) return;
    const bool lower = lane_of() == 0;
    if (lower && column >= l.published && column < l.published_end) give(l.slot + (column - l.published) / 2, packed(v, next));
    if (segment < l.kept) here().kept[segment][at] = v;
    if (lower) {
      if (partner >= 0)
        *reinterpret_cast<uint32_t*>(l.y + column) = packed(plain, plain_next);
      else
        l.y[column] = static_cast<bf16>(plain);
    }
    if (!mixes) return;
    bf16* const conv = l.conv + column - l.conv_first;
    conv[0] = static_cast<bf16>(past[1]);
    conv[l.channels] = static_cast<bf16>(past[2]);
    conv[2 * l.channels] = static_cast<bf16>(plain);
  }
};

// A linear map: `split` warps share the inputs of a pair of columns.
__device__ __noinline__ void linear(int operation_at, int row_at) {
  Shared& shared = here();
  const SoloLinear& l = reinterpret_cast<const SoloOp*>(shared.ops)[operation_at].linear;
  const Range own[3] = {range_of(l.segment[0]), range_of(l.segment[1]), range_of(l.segment[2])};
  const int total = own[0].end - own[0].begin + own[1].end - own[1].begin + own[2].end - own[2].begin;
  const int k = l.k, split = l.split, groups = l.groups, per = l.per;
  const int part = warp_of() * l.inverse / 256, group = warp_of() - part * groups, begin = part * l.share, end = min(begin + l.share, k);
  const bool upper = lane_of() >= 16;
  const bf16* const row = shared.rows[row_at];
  Finish finish;
  int half = 0;
#pragma unroll 1
  for (int p = 0; p < l.packages; ++p) {
    const int turn = l.package + p, count = max(min(total - p * per, per), 0);
    const bf16* const weights = reinterpret_cast<const bf16*>(shared.ring + shared.package[turn].offset);
#pragma unroll 1
    for (int first = 0; first < count || (first == 0 && p == 0); first += 2 * groups) {
      const int column = first + 2 * group;  // of the package
      const bool mine = part < split && column < count;
      finish.begin(l, own, mine && part == 0 ? p * per + column + (upper ? 1 : 0) : total);
      if (column + 1 >= count && upper) finish.column = -1;
      if (p == 0 && first == 0) {
        bf16* const out = shared.rows[row_at];
        if (l.input == StepInput::norm)
          normalise(l, out);
        else if (l.input == StepInput::gated)
          gate(l, out);
        else if (total > 0)
          copy(l, out);
        sync_workers();
      }
      if (first == 0) wait_barrier(&shared.full[turn % kSoloTurns], turn / kSoloTurns % 2);
      float sum[2][2] = {};
      if (mine) {
        const bf16* const one = weights + column * k;
        const int other = column + 1 < count ? k : 0;
#pragma unroll 1
        for (int at = begin + lane_of() * 8; at < end; at += 256) {
          float x[8], w[8];
          const uint4 two = *reinterpret_cast<const uint4*>(one + other + at);
          unpack8(x, *reinterpret_cast<const uint4*>(row + at));
          unpack8(w, *reinterpret_cast<const uint4*>(one + at));
#pragma unroll
          for (int i = 0; i < 8; ++i) sum[0][i % 2] = fmaf(x[i], w[i], sum[0][i % 2]);
          unpack8(w, two);
#pragma unroll
          for (int i = 0; i < 8; ++i) sum[1][i % 2] = fmaf(x[i], w[i], sum[1][i % 2]);
        }
      }
      const float low = sum[0][0] + sum[0][1], high = sum[1][0] + sum[1][1];
      float v = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, 16);
      v = lanes_sum(v, 16);
      if (split > 1) {
        if (mine && lane_of() % 16 == 0) shared.sums[half][part * 2 * groups + 2 * group + (upper ? 1 : 0)] = v;
        sync_workers();
        if (mine && part == 0) {
          v = 0;
#pragma unroll 1
          for (int s = 0; s < split; ++s) v += shared.sums[half][s * 2 * groups + 2 * group + (upper ? 1 : 0)];
        }
        half ^= 1;
      }
      if (mine && part == 0) finish.end(l, v);
    }
    if (count == 0 && p > 0) wait_barrier(&shared.full[turn % kSoloTurns], turn / kSoloTurns % 2);
    __syncwarp();
    if (lane_of() == 0) arrive_barrier(&shared.empty[turn % kSoloTurns]);
  }
}

#endif

}  // namespace krait::kernels::cuda::solo

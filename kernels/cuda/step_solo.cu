#include <cuda_bf16.h>

#include "core/cuda/launch.cuh"
#include "kernels/cuda/epilogue.cuh"
#include "kernels/cuda/step_ring.cuh"
#include "kernels/cuda/step_solo.h"

// A decoding step of one row. Between exchanges little is done, so what counts is how many instructions a warp meets that
// its cache does not hold: every piece of work is one short loop, and there is one body for all linear maps.
namespace krait::kernels::cuda::solo {

constexpr int kWarps = kSoloWarps, kThreads = kSoloThreads;

struct alignas(16) AttentionShared {
  float raw[3 * kSoloHeadDim], turned[2 * kSoloHeadDim];
  float o[kWarps][kSoloHeadDim], m[kWarps], l[kWarps];
};

struct Shared {
  alignas(128) unsigned char ring[kSoloRing];
  alignas(16) bf16 rows[2][kSoloWidth];
  alignas(16) bf16 held[4 * kThreads];  // the residual stream; each thread has its own values of it
  union {
    AttentionShared attention;
    float mixed[kWarps][kSoloMixed];
  };
  alignas(16) unsigned char ops[kMaxSoloOps * sizeof(SoloOp)];
  SoloPackage package[kMaxSoloPackages];
  float sums[2][kWarps * 2];
  float2 statistics[kWarps];
  float kept[2][kSoloKept];
  unsigned long long* pairs;
  uint32_t launch;
  alignas(8) uint64_t full[kSoloTurns];
  alignas(8) uint64_t empty[kSoloTurns];
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

using step::Range, step::arrive_barrier, step::bring, step::expect_bytes, step::fresh, step::init_barrier, step::lane_of, step::lanes_sum,
    step::passing_through, step::rounded, step::share, step::silu, step::unpack8, step::wait_barrier, step::warp_of,
    step::worker;

__device__ __forceinline__ Shared& here() { return *reinterpret_cast<Shared*>(step::shared_memory); }
__device__ __forceinline__ void sync_workers() { asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory"); }

__device__ __forceinline__ Range even_range(int total, int each, int block) {
  const int begin = min(block * each, total);
  return {begin, min(begin + each, total)};
}
__device__ __forceinline__ Range range_of(const SoloSegment& s) {
  return even_range(s.total, s.each, s.reversed != 0 ? static_cast<int>(gridDim.x - 1 - blockIdx.x) : static_cast<int>(blockIdx.x));
}

// Pairs of values.
__device__ __forceinline__ uint4 look(const unsigned long long* p) {  // two pairs
  uint4 v;
  asm volatile("{\n .reg .b64 a, b;\n ld.relaxed.gpu.global.v2.b64 {a, b}, [%4];\n mov.b64 {%0, %1}, a;\n mov.b64 {%2, %3}, b;\n}"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ uint32_t packed(float low, float high) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&two);
}
__device__ __forceinline__ float low_of(uint32_t v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high_of(uint32_t v) { return __uint_as_float(v & 0xffff0000u); }
__device__ __forceinline__ void give(int pair, uint32_t two) {
  asm volatile("{\n .reg .b64 v;\n mov.b64 v, {%1, %2};\n st.relaxed.gpu.global.b64 [%0], v;\n}" ::"l"(here().pairs + pair), "r"(two), "r"(here().launch)
               : "memory");
}

/// Four values, from `at` (a multiple of 4) on; they may not be there yet.
struct Four {
  const SoloSource* from;
  int at;
  bool wanted;
  uint4 v;
  __device__ __forceinline__ Four(const SoloSource& s, int first, bool wants) : from(&s), at(first), wanted(wants), v{0, 0, 0, 0} {}
  __device__ __forceinline__ bool here_now() {
    if (!wanted) return true;
    if (from->slot < 0) {
      const uint2 two = __ldcg(reinterpret_cast<const uint2*>(from->from + at));
      v.x = two.x;
      v.z = two.y;
      return true;
    }
    v = look(here().pairs + from->slot + at / 2);
    const uint32_t launch = here().launch;
    return v.y == launch && v.w == launch;
  }
};
template <class... Others>
__device__ __forceinline__ void await(Four& a, Others&... others) {
  while (!(static_cast<int>(a.here_now()) & (static_cast<int>(others.here_now()) & ... & 1))) {
  }
}

__device__ __forceinline__ float softplus(float v) {
  const float e = __expf(v);
  return v > 20.0f ? v : e < 0.02f ? e * (1.0f - e * (0.5f - e * (1.0f / 3))) : __logf(1.0f + e);
}

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

__device__ __forceinline__ void work(int count) {
  int row = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    switch (reinterpret_cast<const SoloOp*>(here().ops)[i].kind) {
      case SoloKind::linear:
        linear(i, row);
        row ^= 1;
        break;
      case SoloKind::scan: scan(i); break;
      case SoloKind::state: advance_state(i); break;
      case SoloKind::attention: attend(i); break;
    }
  }
}

/// A warp asks for memory to be brought into the L2 cache.
__device__ __noinline__ void touch(const void* from, int bytes) {
  const uintptr_t last = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(bytes);
#pragma unroll 1
  for (uintptr_t at = (reinterpret_cast<uintptr_t>(from) & ~uintptr_t{127}) + static_cast<uintptr_t>(lane_of()) * 128; at < last; at += 32 * 128)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}
/// The same for what all blocks read: each asks for its share.
template <class T>
__device__ __forceinline__ void touch_share(const T* from, int count) {
  if (from == nullptr) return;
  const Range own = share(count);
  touch(from + own.begin, (own.end - own.begin) * static_cast<int>(sizeof(T)));
}

// What a linear map needs beside its weights, into the L2 cache.
__device__ __forceinline__ void touch_linear(const SoloLinear& l, const Range (&own)[3]) {
  if (l.input == StepInput::norm) {
    touch_share(l.norm.w, l.k);
    touch_share(l.norm.b, l.k);
  } else if (l.input == StepInput::gated) {
    touch_share(l.gate.w, l.k);
  }
#pragma unroll 1
  for (int s = 0; s < 3; ++s) {
    const int first = l.segment[s].base + own[s].begin, count = own[s].end - own[s].begin, c = first - l.conv_first;
    if (count <= 0) continue;
    if (l.bias != nullptr) touch(l.bias + first, count * 2);
    if (l.conv == nullptr || c < 0 || c >= l.channels) continue;
    touch(l.conv_weight + 4 * c, count * 8);
    if (l.conv_bias != nullptr) touch(l.conv_bias + c, count * 2);
#pragma unroll 1
    for (int j = 0; j < 3; ++j) touch(l.conv + j * l.channels + c, count * 2);
  }
}
__device__ __forceinline__ void touch_scan(const SoloScan& a) {
  const Range own = even_range(a.e, a.each, static_cast<int>(blockIdx.x));
  const int c = own.begin, count = own.end - own.begin;
  touch(a.h + int64_t{c} * a.n, count * a.n * 4);
  touch(a.A_log + c * a.n, count * a.n * 4);
  touch(a.dt_proj + c * a.r, count * a.r * 2);
  touch(a.dt_bias + c, count * 4);
  touch(a.D + c, count * 4);
}
__device__ __forceinline__ void touch_caches(const AttentionStep& a) {
  const int count = min(max(a.position[0], 0), a.capacity) * a.hkv * a.d;
  touch_share(a.k_cache, count);
  touch_share(a.v_cache, count);
}

#ifndef KRAIT_SOLO_PIECE
#define KRAIT_SOLO_PIECE 4096
#endif

// One warp runs ahead of the workers as far as the ring lets it: weights depend on nothing. They come in pieces: exchanges
// wait longer behind large ones (a step of GPT-2 takes 253 us with 4 KB, 273 us with whole packages).
__device__ __forceinline__ void bring_weights(int count) {
  Shared& shared = here();
  const uint64_t policy = passing_through();
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const SoloOp& op = reinterpret_cast<const SoloOp*>(shared.ops)[i];
    if (op.kind == SoloKind::scan) touch_scan(op.scan);
    if (op.kind == SoloKind::state) {
      const Range own = even_range(op.state.e, op.state.each, static_cast<int>(blockIdx.x));
      touch(op.state.h + int64_t{own.begin} * op.state.n, (own.end - own.begin) * op.state.n * 4);
    }
    if (op.kind == SoloKind::attention) touch_caches(op.attention.of);
    if (op.kind != SoloKind::linear) continue;
    const SoloLinear& l = op.linear;
    const Range own[3] = {range_of(l.segment[0]), range_of(l.segment[1]), range_of(l.segment[2])};
    touch_linear(l, own);
    if (lane_of() != 0) continue;
    const int total = own[0].end - own[0].begin + own[1].end - own[1].begin + own[2].end - own[2].begin, bytes = 2 * l.k;
#pragma unroll 1
    for (int p = 0; p < l.packages; ++p) {
      const int turn = l.package + p, begin = p * l.per, end = min(begin + l.per, total), after = shared.package[turn].after;
      if (after >= 0) wait_barrier(&shared.empty[after % kSoloTurns], after / kSoloTurns % 2);
      uint64_t* const full = &shared.full[turn % kSoloTurns];
      expect_bytes(full, static_cast<uint32_t>(max(end - begin, 0) * bytes));
      unsigned char* to = shared.ring + shared.package[turn].offset;
      int before = 0;  // columns of the segments so far
#pragma unroll 1
      for (int s = 0; s < 3; ++s) {
        const int size = own[s].end - own[s].begin, first = max(begin, before), last = min(end, before + size);
        if (first < last) {
          const auto* from = reinterpret_cast<const unsigned char*>(l.w + int64_t{l.segment[s].base + own[s].begin + first - before} * l.k);
          const auto* const until = from + (last - first) * int64_t{bytes};
#pragma unroll 1
          while (from < until) {
            const auto piece = static_cast<uint32_t>(min(until - from, int64_t{KRAIT_SOLO_PIECE}));
            bring(to, from, piece, full, policy);
            to += piece;
            from += piece;
          }
        }
        before += size;
      }
    }
  }
}

#endif

constexpr int kOpWords = sizeof(SoloOp) / sizeof(uint4), kPackageWords = kMaxSoloPackages * sizeof(SoloPackage) / sizeof(uint4);

// One block a multiprocessor, all at once.
__global__ void __launch_bounds__(kSoloThreads + 32, 1) solo_kernel(const __grid_constant__ SoloProgram program) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  Shared& shared = here();
  if (threadIdx.x == 0) {
    unsigned long long before;
    asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], 1;" : "=l"(before) : "l"(program.counter) : "memory");
    for (int i = 0; i < kSoloTurns; ++i) {
      init_barrier(&shared.full[i], 1);
      init_barrier(&shared.empty[i], kWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    shared.pairs = program.pairs;
    shared.launch = static_cast<uint32_t>(before / gridDim.x) + 1;
  }
  // Read as ordinary memory, all at once: as constants they would come line by line.
  const uint4* from = reinterpret_cast<const uint4*>(program.ops);
  const uint4* packages = reinterpret_cast<const uint4*>(program.package);
  asm volatile("" : "+l"(from), "+l"(packages));
  for (int at = static_cast<int>(threadIdx.x); at < program.count * kOpWords; at += kSoloThreads + 32) reinterpret_cast<uint4*>(shared.ops)[at] = from[at];
  for (int at = static_cast<int>(threadIdx.x); at < kPackageWords; at += kSoloThreads + 32) reinterpret_cast<uint4*>(shared.package)[at] = packages[at];
  __syncthreads();
  if (threadIdx.x < kSoloThreads)
    work(program.count);
  else
    bring_weights(program.count);
#endif
}

}  // namespace krait::kernels::cuda::solo

namespace krait::kernels::cuda {

int solo_blocks(Device device) {
  int blocks = 0;
  check(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device.index));
  return blocks;
}

void run_solo(const SoloProgram& program, Device device, int blocks) {
  constexpr int kShared = static_cast<int>(sizeof(solo::Shared));
  static_assert(kShared <= 227 * 1024 && sizeof(SoloProgram) <= 32764, "more than a block, or a launch, may have");
  static const bool ready = [] {
    check(cudaFuncSetAttribute(solo::solo_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    return true;
  }();
  KRAIT_ASSERT(ready);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kSoloThreads + 32);
  config.dynamicSmemBytes = kShared;
  config.stream = native(current_stream(device));
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, solo::solo_kernel, program));
}

}  // namespace krait::kernels::cuda

#include "kernels/cuda/rows_state.h"

#include "kernels/cuda/aligned.h"
#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/overlap.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kWarps = 8, kOwn = kHeadChannels / kWarps;  // channels of a warp

__device__ __forceinline__ float4 four_of(uint2 v) {
  const float2 a = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&v.x)), b = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&v.y));
  return {a.x, a.y, b.x, b.y};
}
__device__ __forceinline__ float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }
__device__ __forceinline__ void add_scaled(float4& a, float f, float4 b) {
  a = {a.x + f * b.x, a.y + f * b.y, a.z + f * b.z, a.w + f * b.w};
}
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

/// Lanes 4 i to 4 i + 3 receive parts, to be added over the four, of the sum of v[i] over the warp.
__device__ __forceinline__ float sum_of_own(const float (&v)[8], int lane) {
  float a[4], b[2];
  const bool first = lane & 16, second = lane & 8, third = lane & 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = (first ? v[4 + i] : v[i]) + __shfl_xor_sync(0xffffffffu, first ? v[i] : v[4 + i], 16);
#pragma unroll
  for (int i = 0; i < 2; ++i) b[i] = (second ? a[2 + i] : a[i]) + __shfl_xor_sync(0xffffffffu, second ? a[i] : a[2 + i], 8);
  return (third ? b[1] : b[0]) + __shfl_xor_sync(0xffffffffu, third ? b[0] : b[1], 4);
}

/// A block: a head of a row; a warp eight of its channels, a lane four states of each. With s_j = dt_j (x_j (x) B_j) and
/// P the product of the decays since h was written, h_now = P h + sum_j P / P_j s_j, of which only products with C are
/// needed, until the last of `size` positions puts all of them into h. Bound by reading h.
template <bool kNarrow>
__global__ void __launch_bounds__(32 * kWarps, 3) rows_state_kernel(const __grid_constant__ RowsState a) {
  __shared__ float coefficient[kMaxRecent], factor[kMaxRecent], squares[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32, t = lane % 4;
  const int head = static_cast<int>(blockIdx.x), e = a.heads * a.p, first = warp * kOwn, own = first + lane / 4;
  const int64_t row = blockIdx.y, unit = row * a.heads + head;
  const bool alive = first < a.p;  // whole warps
  const int64_t at_h = (unit * a.p + first) * kHeadStates + 4 * lane;
  const auto quad = [&](const bf16* p) { return four_of(*reinterpret_cast<const uint2*>(p + 4 * lane)); };

  uint2 narrow[kNarrow ? kOwn : 1];
  float4 state[kNarrow ? 1 : kOwn];
#pragma unroll
  for (int q = 0; q < kOwn; ++q) {
    if (!alive) break;
    if constexpr (kNarrow)
      narrow[q] = *reinterpret_cast<const uint2*>(static_cast<const bf16*>(a.h) + at_h + q * kHeadStates);
    else
      state[q] = *reinterpret_cast<const float4*>(static_cast<const float*>(a.h) + at_h + q * kHeadStates);
  }
  const float rate = expf(a.A_log[head]), bias = a.dt_bias[head];
  const int m = a.count != nullptr ? a.count[unit] : 0;  // positions not yet in h
  const bf16 *const B_before = a.recent_B + row * a.size * kHeadStates, *const x_before = a.recent_x + unit * a.size * a.p;
  const float2* const steps = reinterpret_cast<const float2*>(a.recent_steps) + unit * a.size;  // dt, log P
  float4 before[2];
  float2 step_before[2]{};
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (const int j = warp + i * kWarps; j < m) {
      before[i] = quad(B_before + j * kHeadStates);
      step_before[i] = steps[j];
    }
  float x_own[kMaxRecent / 4] = {};
#pragma unroll
  for (int i = 0; i < kMaxRecent / 4; ++i)
    if (const int j = t + 4 * i; alive && j < m) x_own[i] = static_cast<float>(x_before[j * a.p + own]);
  const float log_before = m > 0 ? steps[m - 1].y : 0.0f;
  wait_for_previous();
  let_next_begin();

  const bf16 *const mixed = a.mixed + row * a.channels, *const in = a.zxbcdt + row * a.input;
  const float4 B = quad(mixed + e), C = quad(mixed + e + kHeadStates);
  const bf16 x = alive ? mixed[head * a.p + own] : bf16(0.0f);
  const float z = alive ? static_cast<float>(in[head * a.p + own]) : 0.0f;
  const float raw = static_cast<float>(in[e + a.channels + head]) + bias;
  const float dt = fminf(fmaxf(raw > 20.0f ? raw : log1pf(expf(raw)), a.low), a.high);
  const float log_now = log_before - rate * dt, decay = expf(log_now);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (const int j = warp + i * kWarps; j < m) {  // the same for a warp
      const float f = expf(log_now - step_before[i].y) * step_before[i].x, product = warp_sum(dot(before[i], C));
      if (lane == 0) {
        factor[j] = f;
        coefficient[j] = f * product;
      }
    }
  const float now = dt * warp_sum(dot(B, C));
  float parts[kOwn];
#pragma unroll
  for (int q = 0; q < kOwn; ++q)
    if constexpr (kNarrow)
      parts[q] = alive ? dot(four_of(narrow[q]), C) : 0.0f;
    else
      parts[q] = alive ? dot(state[q], C) : 0.0f;
  float u = decay * sum_of_own(parts, lane);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kMaxRecent / 4; ++i)
    if (const int j = t + 4 * i; j < m) u += coefficient[j] * x_own[i];
  u += __shfl_xor_sync(0xffffffffu, u, 1);
  u += __shfl_xor_sync(0xffffffffu, u, 2);
  float square = 0;
  if (alive && t == 0) {
    const int channel = head * a.p + own;
    u += (now + a.D[a.D_columns == 1 ? head : channel]) * static_cast<float>(x);
    const float gated = __fdividef(static_cast<float>(static_cast<bf16>(u)) * z, 1.0f + __expf(-z));
    a.weighted[row * e + channel] = static_cast<bf16>(gated * a.norm[channel]);
    square = gated * gated;
  }
  square = warp_sum(square);
  if (lane == 0) squares[warp] = square;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += squares[w];
    a.squares[unit] = sum;
    if (a.count != nullptr) a.count[unit] = m + 1 < a.size ? m + 1 : 0;
  }

  if (m + 1 < a.size) {
    if (alive && t == 0) a.recent_x[(unit * a.size + m) * a.p + own] = x;
    if (head == 0 && warp == 0)
      *reinterpret_cast<uint2*>(a.recent_B + (row * a.size + m) * kHeadStates + 4 * lane) = *reinterpret_cast<const uint2*>(mixed + e + 4 * lane);
    if (threadIdx.x == 0) reinterpret_cast<float2*>(a.recent_steps)[unit * a.size + m] = {dt, log_now};
    return;
  }
  if (!alive) return;
  float4 next[kOwn];
#pragma unroll
  for (int q = 0; q < kOwn; ++q) {
    next[q] = {};
    if constexpr (kNarrow)
      add_scaled(next[q], decay, four_of(narrow[q]));
    else
      add_scaled(next[q], decay, state[q]);
  }
  const auto take_in = [&](float f, float4 b, const bf16* of) {
    const uint4 words = *reinterpret_cast<const uint4*>(of);
    const float4 low = four_of({words.x, words.y}), high = four_of({words.z, words.w});
    const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int q = 0; q < kOwn; ++q) add_scaled(next[q], f * values[q], b);
  };
#pragma unroll 2
  for (int j = 0; j < m; ++j) take_in(factor[j], quad(B_before + j * kHeadStates), x_before + j * a.p + first);
  take_in(dt, B, mixed + head * a.p + first);
#pragma unroll
  for (int q = 0; q < kOwn; ++q) {
    if constexpr (kNarrow)
      *reinterpret_cast<uint2*>(static_cast<bf16*>(a.h) + at_h + q * kHeadStates) = {pack(next[q].x, next[q].y), pack(next[q].z, next[q].w)};
    else
      *reinterpret_cast<float4*>(static_cast<float*>(a.h) + at_h + q * kHeadStates) = next[q];
  }
}

}  // namespace

bool rows_state_fits(const Tensor& h, const Tensor& zxbcdt, const Mamba2StepWeights& w) {
  const int64_t heads = h.size(1), p = h.size(2), n = h.size(3), channels = w.conv_weight.size(0);
  return zxbcdt.dtype() == DType::bf16 && n == kHeadStates && p % 8 == 0 && p <= kHeadChannels && channels == heads * p + 2 * n && !w.norm_first &&
         w.conv_weight.size(1) == 4 && h.size(0) < 65536 && aligned(h);
}

RowsState rows_state_of(const Tensor& weighted, const Tensor& squares, Tensor& h, RecentPositions* recent, const Tensor& mixed, const Tensor& zxbcdt,
                        const Mamba2StepWeights& w) {
  RowsState a{weighted.data<bf16>(), squares.data<float>(), h.raw_data(), h.dtype() == DType::bf16, mixed.data<bf16>(), zxbcdt.data<bf16>(),
              w.dt_bias.data<float>(), w.A_log.data<float>(), w.D.data<float>(), w.norm_weight.data<float>(), static_cast<float>(w.dt_low),
              static_cast<float>(w.dt_high), static_cast<int>(h.size(0)), static_cast<int>(h.size(1)), static_cast<int>(h.size(2)),
              static_cast<int>(w.conv_weight.size(0)), static_cast<int>(zxbcdt.size(1)), w.D.ndim() == 1 ? 1 : static_cast<int>(h.size(2)),
              nullptr, nullptr, nullptr, nullptr, 1};
  if (recent == nullptr) return a;
  a.recent_x = recent->x.data<bf16>();
  a.recent_B = recent->B.data<bf16>();
  a.recent_steps = recent->steps.data<float>();
  a.count = recent->count.data<int32_t>();
  a.size = static_cast<int>(recent->B.size(1));
  KRAIT_ASSERT(a.size <= kMaxRecent, "more recent positions than a block holds");
  return a;
}

void rows_state(const RowsState& a, Stream stream) {
  launch_overlapped(a.narrow ? rows_state_kernel<true> : rows_state_kernel<false>,
                    {.grid = a.heads, .grid_y = a.rows, .block = 32 * kWarps, .stream = stream}, a);
}

}  // namespace krait::kernels::cuda

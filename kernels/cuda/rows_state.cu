#include "kernels/cuda/rows_state.h"

#include <cstddef>

#include "kernels/cuda/aligned.h"
#include "kernels/cuda/copy_words.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/rows_state.cuh"
#include "kernels/cuda/tma.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kOwn = kHeadChannels / kWarps;  // channels of a warp
constexpr int kStages = 6, kStageBytes = 16 * 1024;
[[maybe_unused]] constexpr int kFlight = 3;  // copies under way: more stand in the way of what the kernel in front still reads
constexpr int kTogether = 2;               // heads that a warp has under way: latency counts
constexpr int kGroup = 12;                 // heads of a row whose small values are brought together
constexpr int kPitch = kHeadChannels + 8;  // different banks

__device__ __forceinline__ void store_quad(bf16* to, int lane, float4 v) { *reinterpret_cast<uint2*>(to + 4 * lane) = {pack(v.x, v.y), pack(v.z, v.w)}; }
__device__ __forceinline__ void store_quad(float* to, int lane, float4 v) { *reinterpret_cast<float4*>(to + 4 * lane) = v; }
/// The threads that compute.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory"); }

/// What a block holds. Position m, the one of this step, stands behind the m that are not yet in h.
struct StateShared {
  alignas(16) bf16 x[kGroup][kMaxRecent][kPitch];
  alignas(16) bf16 B[kMaxRecent][kHeadStates];
  alignas(16) bf16 C[kHeadStates];
  bf16 z[kGroup][kHeadChannels];
  float norm[kGroup][kHeadChannels], D[kGroup][kHeadChannels];
  float2 steps[kGroup][kMaxRecent];  // dt, log P
  float products[kMaxRecent];        // of C with B
  float factor[kGroup][kMaxRecent], coefficient[kGroup][kMaxRecent], decay[kGroup];
  float squares[kGroup][kWarps];
  uint64_t full[kStages], empty[kStages];
  alignas(128) unsigned char ring[kStages][kStageBytes];  // of h; before sm_90 h is read where it lies
};

/// Puts positions 0 to m of the block's q-th head into eight channels' states.
template <class T>
__device__ __forceinline__ void take_in(T* to, const T* from, const StateShared& s, int q, int m, int first_channel, int lane) {
  float4 state[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    state[i] = {};
    add_scaled(state[i], s.decay[q], quad(from + i * kHeadStates, lane));
  }
#pragma unroll 1
  for (int j = 0; j <= m; ++j) {
    const float4 B = quad(s.B[j], lane);
    const uint4 words = *reinterpret_cast<const uint4*>(&s.x[q][j][first_channel]);
    const float4 low = four({words.x, words.y}), high = four({words.z, words.w});
    const float x[kOwn] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < kOwn; ++i) add_scaled(state[i], s.factor[q][j] * x[i], B);
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) store_quad(to + i * kHeadStates, lane, state[i]);
}

/// A block: `chunk` heads, a row's behind one another; of a head a warp eight channels, a lane four states of each. With
/// s_j = dt_j (x_j (x) B_j) and P the product of the decays since h was written, h_now = P h + sum_j P / P_j s_j, of
/// which only products with C are needed, until the last of `size` positions puts all of them into h. Bound by reading h,
/// which a warp of its own brings, from before the kernel in front ends.
template <class T>
__global__ void __launch_bounds__(kThreads + 32) rows_state_kernel(const __grid_constant__ RowsState a, int chunk) {
  constexpr int kPieces = kHeadChannels * kHeadStates * static_cast<int>(sizeof(T)) / kStageBytes;  // of a head's states
  static_assert(kStages % kPieces == 0, "a stage serves the same warps again");
  constexpr int kPieceWarps = kWarps / kPieces, kPieceChannels = kHeadChannels / kPieces;
  extern __shared__ unsigned char state_shared[];
  StateShared& s = *reinterpret_cast<StateShared*>(state_shared);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32, t = lane % 4;
  const int begin = static_cast<int>(blockIdx.x) * chunk, end = min(a.rows * a.heads, begin + chunk);
  T* const h = static_cast<T*>(a.h);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uint32_t full = shared_address(s.full), empty = shared_address(s.empty);
  if (tid == 0) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, kPieceWarps);
    }
    barriers_visible();
  }
  __syncthreads();
  if (warp == kWarps) {
    if (lane > 0) return;
#pragma unroll 1
    for (int i = 0; i < (end - begin) * kPieces; ++i) {
      const int stage = i % kStages, piece = i % kPieces, channels = min(kPieceChannels, a.p - piece * kPieceChannels);
      const uint32_t bytes = max(channels, 0) * kHeadStates * static_cast<int>(sizeof(T));
      if (i >= kStages) barrier_wait(empty + 8 * stage, (i / kStages - 1) % 2);
      if (i >= kFlight) barrier_wait(full + 8 * ((i - kFlight) % kStages), (i - kFlight) / kStages % 2);
      barrier_expect(full + 8 * stage, bytes);
      if (bytes > 0)
        bring_bytes(shared_address(s.ring[stage]), h + (int64_t{begin + i / kPieces} * a.p + piece * kPieceChannels) * kHeadStates, bytes,
                    full + 8 * stage);
    }
    return;
  }
#else
  if (warp == kWarps) return;
#endif
  const int first_channel = warp * kOwn, own = first_channel + lane / 4;
  const bool alive = first_channel < a.p;  // whole warps
  const int e = a.heads * a.p;
  int count = 0;
#pragma unroll 1
  for (int unit = begin; unit < end; unit += count) {
    const int64_t row = unit / a.heads;
    const int head = unit % a.heads;
    count = min(min(end - unit, a.heads - head), kGroup);
    const int m = a.count != nullptr ? a.count[unit] : 0;  // positions not yet in h, of all heads of a row
    if (unit > begin) meet();                   // the heads before have been read
    const int pieces = a.p / 8;
#pragma unroll 1
    for (int u = warp; u < count; u += kWarps) {
      const bf16* const from = a.recent_x + int64_t{unit + u} * a.size * a.p;
#pragma unroll 1
      for (int i = lane; i < m * pieces; i += 32) copy_async(&s.x[u][i / pieces][i % pieces * 8], from + 8 * i, true);
    }
#pragma unroll 1
    for (int i = tid; i < m * (kHeadStates / 8); i += kThreads) copy_async(&s.B[0][0] + 8 * i, a.recent_B + row * a.size * kHeadStates + 8 * i, true);
    const int j = tid % kMaxRecent, u = tid / kMaxRecent;  // of `steps`
    if (u < count && j < m) copy_words<8>(&s.steps[u][j], a.recent_steps + 2 * (int64_t{unit + u} * a.size + j));
    const float rate_log = u < count ? a.A_log[head + u] : 0.0f, bias = u < count ? a.dt_bias[head + u] : 0.0f;
#pragma unroll 1
    for (int i = tid; i < count * a.p; i += kThreads) {
      copy_words<4>(&s.norm[i / a.p][i % a.p], a.norm + head * a.p + i);
      copy_words<4>(&s.D[i / a.p][i % a.p], a.D + (a.D_columns == 1 ? head + i / a.p : head * a.p + i));
    }
    copy_commit();
    if (unit == begin) {
      wait_for_previous();
      let_next_begin();
    }

    const bf16 *const mixed = a.mixed + row * a.channels, *const in = a.zxbcdt + row * a.input;
    const bool keeps = m + 1 < a.size;  // else this step puts all into h
    const float raw = u < count ? static_cast<float>(in[e + a.channels + head + u]) + bias : 0.0f;
    if (tid < kHeadStates / 4) {  // eight values of B or C each
      const int c = tid % (kHeadStates / 8) * 8;
      const bool is_B = tid < kHeadStates / 8;
      const uint4 v = *reinterpret_cast<const uint4*>(mixed + e + (is_B ? 0 : kHeadStates) + c);
      *reinterpret_cast<uint4*>((is_B ? s.B[m] : s.C) + c) = v;
      if (is_B && keeps && head == 0) *reinterpret_cast<uint4*>(a.recent_B + (row * a.size + m) * kHeadStates + c) = v;
    }
    {
      constexpr int kEach = kGroup * kHeadChannels / kThreads;
      bf16 x[kEach], z[kEach];
#pragma unroll
      for (int q = 0; q < kEach; ++q) {
        const int i = tid + q * kThreads;
        if (i >= count * a.p) continue;
        x[q] = mixed[head * a.p + i];
        z[q] = in[head * a.p + i];
      }
#pragma unroll
      for (int q = 0; q < kEach; ++q) {
        const int i = tid + q * kThreads;
        if (i >= count * a.p) continue;
        const int of = i / a.p, c = i % a.p;
        s.x[of][m][c] = x[q];
        s.z[of][c] = z[q];
        if (keeps) a.recent_x[(int64_t{unit + of} * a.size + m) * a.p + c] = x[q];
      }
    }
    copy_wait<0>();
    meet();
    const float4 C = quad(s.C, lane);
#pragma unroll 1
    for (int i = warp; i <= m; i += kWarps)
      if (const float product = sum_lanes<32>(dot(quad(s.B[i], lane), C)); lane == 0) s.products[i] = product;
    meet();
    if (u < count && j <= m) {
      const float dt = fminf(fmaxf(softplus_of(raw), a.low), a.high);
      const float log_now = (m > 0 ? s.steps[u][m - 1].y : 0.0f) - expf(rate_log) * dt;
      const float2 step = j < m ? s.steps[u][j] : float2{dt, log_now};
      const float f = expf(log_now - step.y) * step.x;
      s.factor[u][j] = f;
      s.coefficient[u][j] = f * s.products[j];
      if (j == m) {
        s.decay[u] = expf(log_now);
        if (keeps) reinterpret_cast<float2*>(a.recent_steps)[int64_t{unit + u} * a.size + m] = step;
        if (a.count != nullptr) a.count[unit + u] = keeps ? m + 1 : 0;
      }
    }
    meet();

#pragma unroll 1
    for (int q = 0; q < count; q += kTogether) {
      const T* from[kTogether];
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        if (q + r >= count) {
          from[r] = from[0];  // behind the last head, that one again
          continue;
        }
        from[r] = h + (int64_t{unit + q + r} * a.p + first_channel) * kHeadStates;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        const int item = (unit - begin + q + r) * kPieces + warp / kPieceWarps, stage = item % kStages;
        from[r] = reinterpret_cast<const T*>(s.ring[stage]) + warp % kPieceWarps * kOwn * kHeadStates;
        barrier_wait(full + 8 * stage, item / kStages % 2);
#endif
      }
      float parts[kTogether][kOwn];
      if (alive) {
#pragma unroll
        for (int r = 0; r < kTogether; ++r)
#pragma unroll
          for (int i = 0; i < kOwn; ++i) parts[r][i] = dot(quad(from[r] + i * kHeadStates, lane), C);
        if (!keeps)
#pragma unroll 1
          for (int r = 0; r < min(kTogether, count - q); ++r)
            take_in(h + (int64_t{unit + q + r} * a.p + first_channel) * kHeadStates, r == 0 ? from[0] : from[1], s, q + r, m, first_channel, lane);
      }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      __syncwarp();
      if (lane < min(kTogether, count - q)) barrier_arrive(empty + 8 * (((unit - begin + q + lane) * kPieces + warp / kPieceWarps) % kStages));
#endif
      if (!alive) continue;
#pragma unroll
      for (int r = 0; r < kTogether; ++r) {
        const int of = min(q + r, count - 1);
        float u_own = s.decay[of] * sum_of_own(parts[r], lane);
#pragma unroll
        for (int i = 0; i < kMaxRecent / 4; ++i)
          if (t + 4 * i <= m) u_own += s.coefficient[of][t + 4 * i] * static_cast<float>(s.x[of][t + 4 * i][own]);
        u_own += __shfl_xor_sync(0xffffffffu, u_own, 1);
        u_own += __shfl_xor_sync(0xffffffffu, u_own, 2);
        const float z = static_cast<float>(s.z[of][own]);
        u_own += s.D[of][own] * static_cast<float>(s.x[of][m][own]);
        const float gated = __fdividef(static_cast<float>(static_cast<bf16>(u_own)) * z, 1.0f + __expf(-z));
        if (t == 0) a.weighted[row * e + (head + of) * a.p + own] = static_cast<bf16>(gated * s.norm[of][own]);
        float square = gated * gated;
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) square += __shfl_xor_sync(0xffffffffu, square, offset);
        if (lane == 0) s.squares[of][warp] = square;
      }
    }
    meet();
    if (tid < count) {
      float sum = 0;
      for (int w = 0; w < a.p / kOwn; ++w) sum += s.squares[tid][w];
      a.squares[unit + tid] = sum;
    }
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
  RowsState a{weighted.data<bf16>(), pointer_or_null<float>(squares), h.raw_data(), h.dtype() == DType::bf16, mixed.data<bf16>(), zxbcdt.data<bf16>(),
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
  constexpr int kBlocks = 132;  // one on each multiprocessor of an H100
  const int units = a.rows * a.heads, chunk = (units + kBlocks - 1) / kBlocks;
  const int64_t shared = runs_sm90(stream.device) ? sizeof(StateShared) : offsetof(StateShared, ring);
  const auto start = [&](auto kernel) {
    keep_shared_memory(kernel);
    launch_overlapped(kernel, {.grid = ceil_div(units, chunk), .block = kThreads + 32, .shared = shared, .stream = stream}, a, chunk);
  };
  a.narrow ? start(rows_state_kernel<bf16>) : start(rows_state_kernel<float>);
}

}  // namespace krait::kernels::cuda

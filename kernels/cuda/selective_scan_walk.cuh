#pragma once
#include <algorithm>

#include "kernels/cuda/attention_mma.cuh"
#include "kernels/cuda/selective_scan.cuh"

// The selective scan in bf16 with 16 states: a thread owns a channel with all its states in registers and walks along a
// span of positions; a block is 128 channels, B and C come through shared memory. One span is the whole sequence
// where channels fill the device; else the spans' own states are found first (an exponential more per state).
namespace krait::kernels::cuda {

inline constexpr int kWalkThreads = 128, kWalkStates = 16;
inline constexpr int kWalkRows = 32;  // positions of B and C that the block's threads fetch together
inline constexpr int kWalkKept = 16;  // positions from one kept state to the next

// Where a block works. Channels past e repeat the last one and store nothing.
struct WalkPlace {
  int64_t row, span;
  int channel, t0, t1;
  bool active;
  int warp_channel;  // the warp's first

  __device__ WalkPlace(int64_t e, int64_t l, int64_t length, int64_t spans) {
    row = blockIdx.x / spans;
    span = blockIdx.x % spans;
    const int64_t own = int64_t{blockIdx.y} * kWalkThreads + threadIdx.x;
    active = own < e;
    warp_channel = static_cast<int>(own) - static_cast<int>(threadIdx.x) % 32;
    channel = static_cast<int>(active ? own : e - 1);
    t0 = static_cast<int>(span * length);
    t1 = static_cast<int>(l < (span + 1) * length ? l : (span + 1) * length);
  }
};

// Whether rows may be read in 16-byte pieces.
bool scan_rows_wide(const Tensor& t);
// t, or a contiguous copy where it is neither contiguous nor aligned.
Tensor walk_input(const Tensor& t);

struct WalkSpans {
  int64_t length, count;  // length is a multiple of kScanChunk
};
inline WalkSpans walk_spans(const SelectiveScanInputs& in) {
  const int64_t blocks = in.x.size(0) * ceil_div(in.x.size(2), kWalkThreads), l = in.x.size(1);
  // Three blocks on each of 132 multiprocessors; a block alone on one waits most of its time (B8 E1536 L2048, 96 blocks:
  // 0.43 ms forward and 2.6 backward, 60 and 73 % of what four times as many take).
  const int64_t wanted = std::max<int64_t>(1, 396 / blocks);
  const int64_t length = ceil_div(ceil_div(l, wanted), kScanChunk) * kScanChunk;
  return {length, ceil_div(l, length)};
}

// Eight values of B or C for this thread's place in 32 positions: position threadIdx.x / 4, part threadIdx.x % 4 of
// [B; C]. wide: rows may be read in 16-byte pieces.
__device__ __forceinline__ uint4 fetch_state_rows(const ScanView<bf16>& in, int64_t row, int from, int end, bool wide) {
  const int t = from + static_cast<int>(threadIdx.x) / 4, part = static_cast<int>(threadIdx.x) % 4;
  if (t >= end) return {0, 0, 0, 0};
  const bf16* p = (part < 2 ? in.b + row * in.b_batch + t * in.b_row : in.c + row * in.c_batch + t * in.c_row) +
                  part % 2 * 8;
  if (wide) return *reinterpret_cast<const uint4*>(p);
  const auto two = [&](int i) { return uint32_t{p[i].bits} | uint32_t{p[i + 1].bits} << 16; };
  return {two(0), two(2), two(4), two(6)};
}

__device__ __forceinline__ float low_half(uint32_t v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high_half(uint32_t v) { return __uint_as_float(v & 0xFFFF0000u); }

// base + place, in one instruction.
template <class T>
__device__ __forceinline__ T* at_place(T* base, uint32_t place) {
  T* p;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(p) : "r"(place), "n"(sizeof(T)), "l"(base));
  return p;
}

__device__ __forceinline__ float staged(const bf16* p) {
  return low_half(*reinterpret_cast<const uint16_t*>(p));
}

__device__ __forceinline__ void store_if(bool wanted, bf16* p, float v) {
  const bf16 rounded = static_cast<bf16>(v);
  if (wanted) asm volatile("st.global.u16 [%0], %1;" ::"l"(p), "h"(rounded.bits) : "memory");
}

// What fetch_state_rows read, into rows (kWalkRows, 8): 4 x 4 values of B, then of C.
__device__ __forceinline__ void keep_state_rows(float4* rows, const uint4& v) {
  float4* to = rows + threadIdx.x * 2;
  to[0] = {low_half(v.x), high_half(v.x), low_half(v.y), high_half(v.y)};
  to[1] = {low_half(v.z), high_half(v.z), low_half(v.w), high_half(v.w)};
}

__device__ __forceinline__ float state_of(const float4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

__device__ __forceinline__ float walk_log2(float x) {
  float y;
  asm volatile("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // volatile: no branch around it
  return y;
}

// Relative error below 1e-5 everywhere: a series where 1 + exp(-|x|) would round.
__device__ __forceinline__ float walk_softplus_of(float x, float p) {  // p = exp(-|x|)
  const float series = p * (1.0f - p * (0.5f - p * (1.0f / 3.0f)));
  const float log = walk_log2(1.0f + p) * static_cast<float>(1.0 / kLog2E);
  return fmaxf(x, 0.0f) + (p < 0.03f ? series : log);
}
__device__ __forceinline__ float walk_softplus(float x) {
  return walk_softplus_of(x, scan_exp2(-fabsf(x) * static_cast<float>(kLog2E)));
}
__device__ __forceinline__ float walk_sigmoid(float x) {
  return reciprocal_fast(1.0f + scan_exp2(-x * static_cast<float>(kLog2E)));
}

// Added to the exponent where a document begins: the state before it does not count.
__device__ __forceinline__ float forgetting(uint32_t begins, int i) { return (begins >> i & 1u) != 0 ? -1e30f : 0.0f; }

}  // namespace krait::kernels::cuda

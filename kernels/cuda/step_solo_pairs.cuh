#pragma once
#include <cuda_bf16.h>

#include "kernels/cuda/step_ring.cuh"
#include "kernels/cuda/step_solo.h"

// What the pieces of step_solo.cu share: a block's memory, and values that travel between blocks in pairs, each with the
// number of the launch that made it.
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

#endif

}  // namespace krait::kernels::cuda::solo

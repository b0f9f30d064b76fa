#pragma once
#include <cstdint>

#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/step_program.h"

// What the blocks of the persistent decoding kernel are made of: workers that compute, one warp that brings weights, a
// ring of shared memory between them, and the barrier of all blocks.
namespace krait::kernels::cuda::step {

inline constexpr int kWarps = 12, kWorkers = 32 * kWarps;
inline constexpr int kStages = 6;

struct Shared {
  alignas(128) unsigned char stages[kStages][kStepStageBytes];
  alignas(16) unsigned char rows[kStepRowBytes];
  alignas(16) unsigned char ops[kMaxStepOps * sizeof(StepOp)];
  unsigned long long* counter;  // of arrivals of all blocks, and how many there are when the last operation is done; 0: none
  unsigned long long target;
  float part[2][2][16];
  alignas(8) uint64_t full[kStages];
  alignas(8) uint64_t empty[kStages];
};

extern __shared__ __align__(128) unsigned char shared_memory[];
__device__ __forceinline__ Shared& here() { return *reinterpret_cast<Shared*>(shared_memory); }
__device__ __forceinline__ const StepOp& operation(int at) { return reinterpret_cast<const StepOp*>(here().ops)[at]; }

__device__ __forceinline__ int worker() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int lane_of() { return static_cast<int>(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_of() { return static_cast<int>(threadIdx.x) / 32; }

/// This block's share [begin, end) of `total`; the first block has one whenever there is any.
struct Range {
  int begin, end;
};
__device__ __forceinline__ Range share(int64_t total) {
  const unsigned all = static_cast<unsigned>(total), each = (all + gridDim.x - 1) / gridDim.x;  // 64 bits divide slowly
  const unsigned begin = min(blockIdx.x * each, all);
  return {static_cast<int>(begin), static_cast<int>(min(begin + each, all))};
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void sync_workers() { asm volatile("bar.sync 1, %0;" ::"n"(kWorkers) : "memory"); }

__device__ __forceinline__ void init_barrier(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void wait_barrier(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0)
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
}
__device__ __forceinline__ void arrive_barrier(uint64_t* barrier) {
  asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
/// Weights pass once: they should not push states and caches out of the L2 cache.
__device__ __forceinline__ uint64_t passing_through() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void bring(void* to, const void* from, uint32_t bytes, uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

/// A warp asks for the memory to be brought into the L2 cache.
__device__ __forceinline__ void touch(const void* from, int64_t bytes) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(from) / 128, last = (reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(bytes) + 127) / 128;
  for (uintptr_t line = first + static_cast<uintptr_t>(lane_of()); line < last; line += 32)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line * 128));
}
/// The same for what all blocks read: each asks for its share.
template <class T>
__device__ __forceinline__ void touch_share(const T* from, int64_t count) {
  if (from == nullptr) return;
  const Range own = share(count);
  if (own.begin < own.end) touch(from + own.begin, (own.end - own.begin) * static_cast<int64_t>(sizeof(T)));
}

/// Stages in the order in which the weights come; workers and the bringing warp count for themselves.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

/// All blocks, between operations: arrive() once the own part is done, wait() before the others' results are read.
__device__ __forceinline__ void arrive(Shared& shared) {
  sync_workers();
  if (worker() != 0) return;
  if (shared.target == 0) {
    unsigned long long before;
    asm volatile("atom.release.gpu.global.add.u64 %0, [%1], 1;" : "=l"(before) : "l"(shared.counter) : "memory");
    shared.target = before - before % gridDim.x;
  } else {
    asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(shared.counter) : "memory");
  }
  shared.target += gridDim.x;
}
__device__ __forceinline__ void wait(Shared& shared) {
  if (worker() == 0 && shared.target != 0) {
    unsigned long long now;
    const unsigned long long target = shared.target;
    do asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(now) : "l"(shared.counter) : "memory");
    while (now < target);
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(now) : "l"(shared.counter) : "memory");
  }
  sync_workers();
}

// What the launch itself writes is read past the L1 cache.
__device__ __forceinline__ float fresh(const bf16* p) {
  return __uint_as_float(static_cast<uint32_t>(__ldcg(reinterpret_cast<const unsigned short*>(p))) << 16);
}
__device__ __forceinline__ void unpack8(float (&out)[8], uint4 v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(words[i] << 16);
    out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ void fresh8(float (&out)[8], const bf16* p) { unpack8(out, __ldcg(reinterpret_cast<const uint4*>(p))); }
__device__ __forceinline__ void read8(float (&out)[8], const bf16* p) { unpack8(out, *reinterpret_cast<const uint4*>(p)); }
__device__ __forceinline__ void write8(bf16* p, const float (&in)[8]) { store_values(p, in); }

__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }
__device__ __forceinline__ float rounded(float v) { return static_cast<float>(static_cast<bf16>(v)); }

/// Sums over groups of 2^k lanes; all lanes get them.
__device__ __forceinline__ float lanes_sum(float v, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

/// Sums of N values over neighbouring groups of `warps` warps (a power of two); all workers call it. Two calls in a row
/// take different buffers.
template <int N>
__device__ __forceinline__ void warps_sum(float (&v)[N], int warps, int buffer, Shared& shared) {
  static_assert(N <= 2);
#pragma unroll
  for (int n = 0; n < N; ++n) v[n] = lanes_sum(v[n], 32);
  if (lane_of() == 0)
#pragma unroll
    for (int n = 0; n < N; ++n) shared.part[buffer][n][warp_of()] = v[n];
  sync_workers();
  const int at = warp_of() / warps * warps + lane_of() % warps;
#pragma unroll
  for (int n = 0; n < N; ++n) v[n] = lanes_sum(shared.part[buffer][n][at], warps);
}

#endif

}  // namespace krait::kernels::cuda::step

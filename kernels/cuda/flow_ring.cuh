#pragma once
#include <cstdint>

#include "kernels/cuda/packed.cuh"
#include "kernels/cuda/flow_program.h"

// What the blocks of the persistent decoding kernel are made of: workers that compute, one warp that brings weights, a
// ring of shared memory between them, and the slots through which blocks give each other values.
namespace krait::kernels::cuda::flow::step {

inline constexpr int kWarps = kStepWarps, kWorkers = 32 * kWarps;
inline constexpr int kStages = 5;
inline constexpr int kTile = 16;  // columns of a linear map that are multiplied at a time
inline constexpr int kSumRow = kTile + 4, kSums = kMaxStepRows * kSumRow;  // banks apart for the lanes of a fragment
inline constexpr int kParts = kStepParts;

struct Shared {
  alignas(128) unsigned char stages[kStages][kStepStageBytes];
  alignas(16) unsigned char rows[kStepRowBytes];
  alignas(16) unsigned char ops[kMaxStepOps * sizeof(StepOp)];
  float sums[2][kWarps][kSums];                      // columns of a linear map, summed over a warp's inputs
  float2 statistics[kMaxStepRows][kParts * kWarps];  // of a norm, likewise
  bf16* slots;
  uint4* unused;  // the other set, and its pieces that the launch before has filled
  int unused_pieces;
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
#pragma unroll 1
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

/// Stages are counted in the order in which the weights come; workers and the bringing warp count for themselves.
__device__ __forceinline__ uint32_t stage_of(uint32_t turn) { return turn % kStages; }
__device__ __forceinline__ uint32_t parity_of(uint32_t turn) { return turn / kStages % 2; }

/// Columns of y whose weights fill a stage.
__device__ __forceinline__ int columns_of_stage(int k) { return kStepStageBytes / step_pitch(k); }

// Values of the launch itself, past the L1 cache. Every value is its own flag: nothing else is read on its strength, so
// no order between values is needed.
struct Source {
  const bf16* at;
  bool awaited;
};
__device__ __forceinline__ Source source_of(const StepValues& v) {
  return v.slot >= 0 ? Source{here().slots + v.slot, true} : Source{v.from, false};
}
__device__ __forceinline__ uint4 look8(const bf16* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint16_t look(const bf16* p) {
  uint16_t v;
  asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
  return v;
}
/// Not zero when a half of the word is absent.
__device__ __forceinline__ uint32_t holes(uint32_t word) { return (~word - 0x00010001u) & word & 0x80008000u; }
__device__ __forceinline__ bool complete(uint4 v) { return (holes(v.x) | holes(v.y) | holes(v.z) | holes(v.w)) == 0; }
/// Looks again until the eight values are there; `v` is what a first look has seen.
__device__ __forceinline__ void await8(uint4& v, const bf16* p, bool awaited) {
  while (awaited && !complete(v)) v = look8(p);
}
__device__ __forceinline__ float await(Source s, int64_t offset) {
  uint16_t v = look(s.at + offset);
  while (s.awaited && v == kStepAbsent) v = look(s.at + offset);
  return __uint_as_float(static_cast<uint32_t>(v) << 16);
}
__device__ __forceinline__ void put(bf16* p, bf16 v) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(p), "h"(*reinterpret_cast<const uint16_t*>(&v)) : "memory");
}
__device__ __forceinline__ void give(const StepResult& r, int row, int column, float value) {
  const int at = row * r.row + column;
  const bf16 v = static_cast<bf16>(value);
  if (r.slot >= 0) put(here().slots + r.slot + at, v);
  if (r.to != nullptr) r.to[at] = v;
}
__device__ __forceinline__ void give8(const StepResult& r, int row, int column, uint4 v) {
  const int at = row * r.row + column;
  if (r.slot >= 0)
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(here().slots + r.slot + at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  if (r.to != nullptr) *reinterpret_cast<uint4*>(r.to + at) = v;
}

// States that a launch before has written are read past the L1 cache.
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
__device__ __forceinline__ uint4 pack8(const float (&in)[8]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(in[2 * i], in[2 * i + 1]);
    words[i] = *reinterpret_cast<const uint32_t*>(&two);
  }
  return {words[0], words[1], words[2], words[3]};
}

__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }
__device__ __forceinline__ float rounded(float v) { return static_cast<float>(static_cast<bf16>(v)); }
/// log(1 + e^v)
__device__ __forceinline__ float softplus(float v) {
  const float e = __expf(v);
  return v > 20.0f ? v : e < 0.02f ? e * (1.0f - e * (0.5f - e * (1.0f / 3))) : __logf(1.0f + e);
}

/// Sums over groups of 2^k lanes; all lanes get them.
__device__ __forceinline__ float lanes_sum(float v, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

#endif

}  // namespace krait::kernels::cuda::flow::step

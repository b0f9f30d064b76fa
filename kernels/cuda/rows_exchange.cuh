#pragma once
// Values between blocks that run at the same time, without fences, counters or flags on their way: a word says itself
// that it has arrived. Before it is sent, a word holds kNothing, which as a pair of bf16 or as fp32 is a NaN that no
// conversion and no arithmetic makes (theirs are 0x7fff, 0x7fffffff). All accesses are relaxed ones of the GPU's scope,
// word by word: nothing is assumed of the order in which words arrive, vectors included.
//
// A place serves again after forget(), for which two things must hold:
// - All readers have finished: the block that forgets has received what each of them could send only when it had read.
// - No reader looks for the next value before it can see kNothing, else it takes the old one for it. This needs a
//   release and an acquire, off the way of the values: forget(), a meeting of the block, announce(); await() of all
//   who forget, a meeting or an mbarrier of the block, receive(). In a layer or two nobody has to wait there.
// What a run begins with is of no account when it forgets all its places first, by the same chain.
#include "kernels/cuda/tma.cuh"

namespace krait::kernels::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

inline constexpr uint32_t kNothing = 0xffffffffu;
inline constexpr int kExchangePolls = 1 << 22;  // seconds: who should send is not there

/// Of a word that a conversion to bf16 made (pack()), not of bits that came from memory.
__device__ __forceinline__ void send(void* to, uint32_t pair) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(pair) : "memory");
}
__device__ __forceinline__ void send(void* to, uint4 pairs) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(pairs.x), "r"(pairs.y), "r"(pairs.z), "r"(pairs.w) : "memory");
}
/// fp32 words of any bits.
__device__ __forceinline__ uint32_t sendable(float v) {
  const uint32_t bits = __float_as_uint(v);
  return bits == kNothing ? 0x7fffffffu : bits;
}
__device__ __forceinline__ void send(float* to, float v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(sendable(v)) : "memory");
}
__device__ __forceinline__ void send(float2* to, float2 v) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(sendable(v.x)), "r"(sendable(v.y)) : "memory");
}

__device__ __forceinline__ void look(uint32_t& v, const void* from) {
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from));
}
__device__ __forceinline__ void look(uint4& v, const void* from) {
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
}
__device__ __forceinline__ bool arrived(uint32_t v) { return v != kNothing; }
__device__ __forceinline__ bool arrived(uint4 v) { return max(max(v.x, v.y), max(v.z, v.w)) != kNothing; }

/// What look() has asked for at from(i), i < kN, asked for again where it had not arrived.
template <int kN, class V, class From>
__device__ __forceinline__ void insist(V* v, From from) {
  for (int polls = 0;; ++polls) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < kN; ++i) all &= arrived(v[i]);
    if (all) break;
    if (polls == kExchangePolls) __trap();
#pragma unroll
    for (int i = 0; i < kN; ++i)
      if (!arrived(v[i])) look(v[i], from(i));
  }
}
/// v[i] = what is sent to from(i), where wanted(i); else v[i] stays (not kNothing). All are asked for, and again what is
/// missing.
template <class V, int kN, class From, class Wanted>
__device__ __forceinline__ void receive(V (&v)[kN], From from, Wanted wanted) {
#pragma unroll
  for (int i = 0; i < kN; ++i)
    if (wanted(i)) look(v[i], from(i));
  insist<kN>(v, from);
}
/// The same of one.
template <class V>
__device__ __forceinline__ void insist(V& v, const void* from) {
  for (int polls = 0; !arrived(v); ++polls) {
    if (polls == kExchangePolls) __trap();
    look(v, from);
  }
}

/// `rows` rows of kVectors 16 bytes each, `pitch` bytes apart, hold nothing again. kThreads threads call it, this is the
/// `thread`th.
template <int kVectors, int kThreads>
__device__ __forceinline__ void forget(void* from, int rows, int64_t pitch, int thread = static_cast<int>(threadIdx.x)) {
#pragma unroll 1
  for (int i = thread; i < rows * kVectors; i += kThreads)
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %1, %1, %1};" ::"l"(static_cast<char*>(from) + i / kVectors * pitch + i % kVectors * 16),
                 "r"(kNothing)
                 : "memory");
}

/// One thread, after its block has met: what the block wrote before is seen by all who await as many.
__device__ __forceinline__ void announce(unsigned* counter) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory"); }
__device__ __forceinline__ void await(const unsigned* counter, unsigned count) {
  for (int polls = 0; polls < kExchangePolls; ++polls) {
    unsigned now = 0;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    if (now >= count) return;
  }
  __trap();
}

/// Counters that tell when it pays to look, no more: without a fence the values come later. One thread says that its block
/// sends; one waits until `blocks` have.
__device__ __forceinline__ void hint(unsigned* counter) { asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory"); }
__device__ __forceinline__ void await_hints(const unsigned* counter, unsigned blocks) {
  uint32_t now;
  int polls = 0;
  do {
    look(now, counter);
    if (++polls == kExchangePolls) __trap();
  } while (now < blocks);
}

/// The warp of a block that takes its words back, layer by layer, while others compute: forget(i) after `received` of layer
/// i, announced at cleared(i + 1). `clean` tells those that compute, in layer i, that all `blocks` have done what they announced
/// there. The words of all layers have been cleared before. kStreams of values, in turn, each with its barriers.
template <int kStreams, class Cleared, class Forget>
__device__ __forceinline__ void take_words_back(int layers, unsigned blocks, uint64_t* received, uint64_t* clean, int lane, Cleared cleared, Forget forget) {
  if (lane == 0)
    for (int of = 0; of < kStreams; ++of) announce(cleared(0, of));
#pragma unroll 1
  for (int i = 0; i < (layers - 1) * kStreams; ++i) {
    const int layer = i / kStreams, of = i % kStreams;
    if (layer > 0) barrier_wait(shared_address(received + of), layer % 2);
    if (lane == 0) {
      await(cleared(layer, of), blocks);
      barrier_arrive(shared_address(clean + of));
    }
    if (layer == 0) barrier_wait(shared_address(received + of), 0);
    __syncwarp();
    forget(layer, of);
    __syncwarp();
    if (lane == 0) announce(cleared(layer + 1, of));
  }
  if (layers == 1 && lane == 0)
    for (int of = 0; of < kStreams; ++of) {
      await(cleared(0, of), blocks);
      barrier_arrive(shared_address(clean + of));
    }
}

#endif

}  // namespace krait::kernels::cuda

#pragma once
// Thread-block clusters of sm_90: values stored straight into another block's shared memory, counted by a barrier
// there. Only what is compiled for sm_90 or later may call these.
#include <cstdint>

#include "kernels/cuda/attention_mma.cuh"

namespace krait::kernels::cuda {

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}
/// What lies at this address of shared memory in block `rank` of the cluster.
__device__ inline uint32_t of_block(uint32_t shared, uint32_t rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(there) : "r"(shared), "r"(rank));
  return there;
}
/// All threads of all blocks of the cluster.
__device__ inline void cluster_barrier() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

/// A barrier (8 bytes of shared memory) whose phase ends when the bytes announced for it have arrived.
__device__ inline void arrivals_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;\n" ::"r"(barrier) : "memory");
}
/// Once per phase, by one thread; the bytes may have come before.
__device__ inline void arrivals_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}
/// Until the phase of this parity (0, 1, 0, ..) has ended.
__device__ inline void arrivals_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
}
/// Into the block that both addresses (of_block) name; its barrier counts the bytes.
__device__ inline void send(uint32_t to, uint32_t barrier, uint4 v) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];\n" ::"r"(to),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(barrier)
               : "memory");
}
__device__ inline void send(uint32_t to, uint32_t barrier, float x, float y) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];\n" ::"r"(to), "f"(x),
               "f"(y), "r"(barrier)
               : "memory");
}

/// The 8 x 8 matrix of 16-bit values that a warp holds (lane 4 g + t: row g, columns 2t, 2t + 1), transposed.
__device__ inline uint32_t transposed(uint32_t v) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(out) : "r"(v));
  return out;
}

}  // namespace krait::kernels::cuda

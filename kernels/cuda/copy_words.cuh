#pragma once
#include "kernels/cuda/attention_mma.cuh"

namespace krait::kernels::cuda {

/// 4 or 8 bytes from global to shared memory, counted with copy_async()'s.
template <int kBytes>
__device__ __forceinline__ void copy_words(void* to, const void* from) {
  static_assert(kBytes == 4 || kBytes == 8, "16 bytes: copy_async");
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;\n" ::"r"(shared_address(to)), "l"(from), "n"(kBytes) : "memory");
}

}  // namespace krait::kernels::cuda

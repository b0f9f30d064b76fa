#pragma once
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/launch_with.cuh"

// Programmatic dependent launch, for chains of kernels that are too short to hide their own start: a kernel launched
// with launch_overlapped may begin while those before it run. Until wait_for_previous(), which returns when the kernel
// before has finished, it writes no memory, and reads only what no kernel that can be under way wrote: weights, which may
// also be brought into the L2 cache. Before sm_90 all of it is nothing. Where let_next_begin() follows
// wait_for_previous(), all but that one kernel have finished when the next begins, which may then read what older ones
// wrote.
namespace krait::kernels::cuda {

__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Asks for memory to be brought into the L2 cache, where address and size are multiples of 16 bytes.
__device__ __forceinline__ void bring_into_l2(const void* from, int64_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (bytes > 0 && ((reinterpret_cast<uintptr_t>(from) | static_cast<uintptr_t>(bytes)) & 15) == 0)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(static_cast<uint32_t>(bytes)) : "memory");
#endif
}

/// The usual start of a kernel that has nothing to bring.
__device__ __forceinline__ void take_over() {
  let_next_begin();
  wait_for_previous();
}

/// For kernels of much shared memory that are to begin beside one another: they ask for the same division of a
/// multiprocessor's memory, which changes only when nothing runs there.
template <class... P>
void keep_shared_memory(void (*kernel)(P...)) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
}

/// May begin while the kernels before it run.
inline cudaLaunchAttribute overlapping() {
  cudaLaunchAttribute a{};
  a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  a.val.programmaticStreamSerializationAllowed = 1;
  return a;
}

/// launch() for a kernel that calls wait_for_previous() before it writes memory, or reads what kernels in front write.
template <class... P, class... A>
void launch_overlapped(void (*kernel)(P...), const LaunchConfig& c, A&&... arguments) {
  if (!runs_sm90(c.stream.device)) return launch(kernel, c, std::forward<A>(arguments)...);
  launch_with({overlapping()}, kernel, c, std::forward<A>(arguments)...);
}

}  // namespace krait::kernels::cuda

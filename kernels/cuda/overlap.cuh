#pragma once
#include "core/cuda/launch.cuh"

// Programmatic dependent launch, for chains of kernels that are too short to hide their own start: a kernel launched
// with launch_overlapped may begin while those before it run. Until wait_for_previous(), which returns when the kernel
// before has finished, it may ask for weights to be brought into the L2 cache and nothing else: it neither reads nor
// writes memory. Before sm_90 all of it is nothing.
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

/// launch() for a kernel that calls wait_for_previous() in every thread before it reads or writes memory.
template <class... P, class... A>
void launch_overlapped(void (*kernel)(P...), const LaunchConfig& c, A&&... arguments) {
  static const bool able = device_info(c.stream.device).compute_capability >= 90;
  if (!able) return launch(kernel, c, std::forward<A>(arguments)...);
  if (c.grid <= 0 || c.grid_y <= 0 || c.grid_z <= 0) return;
  KRAIT_CHECK(c.grid < (int64_t{1} << 31) && c.grid_y < 65536 && c.grid_z < 65536,
              "CUDA grid ({}, {}, {}) is too large; use a smaller batch", c.grid, c.grid_y, c.grid_z);
  if (c.shared > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(c.shared)));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(c.grid), static_cast<unsigned>(c.grid_y), static_cast<unsigned>(c.grid_z));
  config.blockDim = dim3(static_cast<unsigned>(c.block));
  config.dynamicSmemBytes = static_cast<size_t>(c.shared);
  config.stream = native(c.stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...));
}

}  // namespace krait::kernels::cuda

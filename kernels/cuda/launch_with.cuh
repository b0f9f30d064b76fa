#pragma once
#include <algorithm>
#include <array>
#include <initializer_list>

#include "core/cuda/launch.cuh"

// launch() with attributes.
namespace krait::kernels::cuda {

/// What the runtime wants to know of such a launch.
struct AttributedLaunch {
  std::array<cudaLaunchAttribute, 2> attributes{};
  cudaLaunchConfig_t config{};

  AttributedLaunch(std::initializer_list<cudaLaunchAttribute> a, const LaunchConfig& c) {
    std::copy(a.begin(), a.end(), attributes.begin());
    config.gridDim = dim3(static_cast<unsigned>(c.grid), static_cast<unsigned>(c.grid_y), static_cast<unsigned>(c.grid_z));
    config.blockDim = dim3(static_cast<unsigned>(c.block));
    config.dynamicSmemBytes = static_cast<size_t>(c.shared);
    config.stream = native(c.stream);
    config.attrs = attributes.data();
    config.numAttrs = static_cast<unsigned>(a.size());
  }
  AttributedLaunch(const AttributedLaunch&) = delete;  // config points here
};

template <class... P>
void allow_shared(void (*kernel)(P...), int64_t bytes) {
  if (bytes > 48 * 1024)
    core::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

template <class... P, class... A>
void launch_with(std::initializer_list<cudaLaunchAttribute> attributes, void (*kernel)(P...), const LaunchConfig& c, A&&... arguments) {
  if (c.grid <= 0 || c.grid_y <= 0 || c.grid_z <= 0) return;
  KRAIT_CHECK(c.grid < (int64_t{1} << 31) && c.grid_y < 65536 && c.grid_z < 65536,
              "CUDA grid ({}, {}, {}) is too large; use a smaller batch", c.grid, c.grid_y, c.grid_z);
  allow_shared(kernel, c.shared);
  const AttributedLaunch launch(attributes, c);
  core::check(cudaLaunchKernelEx(&launch.config, kernel, static_cast<P>(arguments)...));
}

}  // namespace krait::kernels::cuda

#pragma once
#include "kernels/cuda/launch_with.cuh"

// Kernels whose blocks come in clusters of a size that the launch says.
namespace krait::kernels::cuda {

inline cudaLaunchAttribute clusters_of(int blocks) {
  cudaLaunchAttribute a{};
  a.id = cudaLaunchAttributeClusterDimension;
  a.val.clusterDim.x = static_cast<unsigned>(blocks);
  a.val.clusterDim.y = a.val.clusterDim.z = 1;
  return a;
}

/// launch() in clusters of so many blocks along x.
template <class... P, class... A>
void launch_clusters(void (*kernel)(P...), int blocks, const LaunchConfig& c, A&&... arguments) {
  launch_with({clusters_of(blocks)}, kernel, c, std::forward<A>(arguments)...);
}

/// How many such clusters the GPU holds at once.
template <class... P>
int most_clusters(void (*kernel)(P...), int blocks, const LaunchConfig& c) {
  allow_shared(kernel, c.shared);
  const AttributedLaunch launch({clusters_of(blocks)}, c);
  int count = 0;
  check(cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config));
  return count;
}

}  // namespace krait::kernels::cuda

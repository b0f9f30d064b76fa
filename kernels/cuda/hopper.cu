#include "kernels/cuda/hopper.h"

#include <map>
#include <mutex>
#include <utility>

#include "core/cuda/check.h"

namespace krait::kernels::cuda {

namespace {

__global__ void probe_kernel() {}

constexpr int kRegistersOfEmpty = 32;  // more than an empty body takes, less than one with wgmma

}  // namespace

int hopper_multiprocessors(Device device, const void* kernel) {
  static std::mutex mutex;
  static auto* known = new std::map<std::pair<int, const void*>, int>;
  const std::lock_guard lock(mutex);
  const auto [at, fresh] = known->try_emplace({device.index, kernel}, 0);
  if (!fresh) return at->second;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel));
  const DeviceInfo info = device_info(device);
  if (info.compute_capability == 90 && attributes.numRegs > kRegistersOfEmpty) at->second = info.multiprocessors;
  return at->second;
}

bool runs_sm90(Device device) {
  static const bool able = [&] {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, probe_kernel));
    return attributes.ptxVersion >= 90 && device_info(device).compute_capability >= 90;
  }();
  return able;
}

}  // namespace krait::kernels::cuda

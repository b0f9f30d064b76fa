#include "core/device_timer.h"

#include <chrono>
#include <fstream>

#include "core/cuda/check.h"
#include "core/stream.h"

namespace krait::core {

namespace {
using Clock = std::chrono::steady_clock;

std::string version_text(int v) { return v > 0 ? fmt::format("{}.{}", v / 1000, v % 1000 / 10) : ""; }
}  // namespace

struct DeviceTimer::Impl {
  Device device;
  std::vector<cudaEvent_t> events;       // begin and end of each lap
  std::vector<Clock::time_point> times;  // the same on a CPU

  void mark(size_t i) {
    if (device.is_cpu())
      times[i] = Clock::now();
    else
      check(cudaEventRecord(events[i], static_cast<cudaStream_t>(current_stream(device).handle)));
  }
};

DeviceTimer::DeviceTimer(Device device, int64_t laps) : impl_(std::make_unique<Impl>()) {
  impl_->device = device;
  const auto marks = static_cast<size_t>(2 * laps);
  if (device.is_cpu()) {
    impl_->times.resize(marks);
    return;
  }
  current_stream(device);  // makes the device the current one
  impl_->events.resize(marks);
  for (cudaEvent_t& e : impl_->events) check(cudaEventCreate(&e));
}

DeviceTimer::~DeviceTimer() {
  for (const cudaEvent_t e : impl_->events) cudaEventDestroy(e);
}

void DeviceTimer::begin(int64_t lap) { impl_->mark(static_cast<size_t>(2 * lap)); }
void DeviceTimer::end(int64_t lap) { impl_->mark(static_cast<size_t>(2 * lap + 1)); }

std::vector<double> DeviceTimer::milliseconds() {
  synchronize(impl_->device);
  std::vector<double> out;
  for (size_t i = 0; i + 1 < impl_->times.size(); i += 2)
    out.push_back(std::chrono::duration<double, std::milli>(impl_->times[i + 1] - impl_->times[i]).count());
  for (size_t i = 0; i + 1 < impl_->events.size(); i += 2) {
    float ms = 0;
    check(cudaEventElapsedTime(&ms, impl_->events[i], impl_->events[i + 1]));
    out.push_back(ms);
  }
  return out;
}

CudaVersions cuda_versions() {
  CudaVersions v;
  int n = 0;
  if (cudaRuntimeGetVersion(&n) == cudaSuccess) v.runtime = version_text(n);
  if (cudaDriverGetVersion(&n) == cudaSuccess) v.driver = version_text(n);
  // "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159  ...": the release stands beside its CUDA version.
  std::ifstream file("/proc/driver/nvidia/version");
  std::string word;
  while (file >> word)
    if (word == "Module" && file >> word) {
      if (word == "for") file >> word >> word;  // "... Open Kernel Module for x86_64  580.159"
      v.driver += fmt::format("{}{}", v.driver.empty() ? "" : " ", "(" + word + ")");
      break;
    }
  return v;
}

}  // namespace krait::core

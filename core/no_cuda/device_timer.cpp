#include "core/device_timer.h"

#include <chrono>

#include "core/dispatch.h"

namespace krait::core {

struct DeviceTimer::Impl {
  std::vector<std::chrono::steady_clock::time_point> times;  // begin and end of each lap
};

DeviceTimer::DeviceTimer(Device device, int64_t laps) : impl_(std::make_unique<Impl>()) {
  if (device.is_cuda()) throw_no_cuda();
  impl_->times.resize(static_cast<size_t>(2 * laps));
}
DeviceTimer::~DeviceTimer() = default;

void DeviceTimer::begin(int64_t lap) { impl_->times[static_cast<size_t>(2 * lap)] = std::chrono::steady_clock::now(); }
void DeviceTimer::end(int64_t lap) { impl_->times[static_cast<size_t>(2 * lap + 1)] = std::chrono::steady_clock::now(); }

std::vector<double> DeviceTimer::milliseconds() {
  std::vector<double> out;
  for (size_t i = 0; i + 1 < impl_->times.size(); i += 2)
    out.push_back(std::chrono::duration<double, std::milli>(impl_->times[i + 1] - impl_->times[i]).count());
  return out;
}

CudaVersions cuda_versions() { return {}; }

}  // namespace krait::core

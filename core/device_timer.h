#pragma once
#include <memory>
#include <string>
#include <vector>

#include "core/device.h"

namespace krait {
inline namespace core {

/// Times of laps of work on a device, between marks in its current stream: nothing waits until the times are read.
/// On a CPU, where work is immediate, a clock.
class DeviceTimer {
 public:
  DeviceTimer(Device device, int64_t laps);
  ~DeviceTimer();
  DeviceTimer(const DeviceTimer&) = delete;
  DeviceTimer& operator=(const DeviceTimer&) = delete;

  void begin(int64_t lap);
  void end(int64_t lap);
  /// Of all laps, each begun and ended. Waits for the device.
  std::vector<double> milliseconds();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// "12.8", for reports; empty in a build without CUDA or on a machine without a driver.
struct CudaVersions { std::string runtime, driver; };
CudaVersions cuda_versions();

}  // namespace core
}  // namespace krait

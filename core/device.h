#pragma once
#include <cstdint>
#include <string>

#include "core/error.h"

namespace krait {
inline namespace core {

/// Where a tensor lives. One process drives at most one CUDA device at a time.
struct Device {
  enum class Type : uint8_t { cpu, cuda };
  Type type = Type::cpu;
  int index = 0;

  bool is_cpu() const { return type == Type::cpu; }
  bool is_cuda() const { return type == Type::cuda; }
  std::string str() const { return is_cpu() ? "cpu" : fmt::format("cuda:{}", index); }
  friend bool operator==(const Device&, const Device&) = default;
};

inline constexpr Device kCpu{};
inline Device cuda_device(int index = 0) { return {Device::Type::cuda, index}; }

/// Number of usable CUDA devices: 0 in a build without CUDA or on a machine without one.
int cuda_device_count();
/// Whether this binary contains the CUDA kernels at all.
bool built_with_cuda();

struct DeviceInfo {
  std::string name;            // "NVIDIA H100 80GB HBM3", or the CPU model
  int compute_capability = 0;  // 90 for Hopper; 0 for a CPU
  int multiprocessors = 0;
  int64_t total_bytes = 0;
};
DeviceInfo device_info(Device device);

/// Blocks until all work queued on the device is done; errors of that work surface here.
void synchronize(Device device);

}  // namespace core
}  // namespace krait

template <>
struct fmt::formatter<krait::Device> : fmt::formatter<fmt::string_view> {
  template <class Context>
  auto format(const krait::Device& device, Context& ctx) const {
    return fmt::formatter<fmt::string_view>::format(device.str(), ctx);
  }
};

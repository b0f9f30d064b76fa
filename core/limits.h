#pragma once
#include <cstdint>
#include <string>

namespace krait {
inline namespace core {

/// What the control groups of this process (a container, a batch job) leave it. 0: not limited.
struct GroupLimits {
  double processors = 0;  // processor time per time
  int64_t memory_bytes = 0;
};
/// Versions 1 and 2 of Linux. `root` holds proc and sys: another directory for tests.
GroupLimits group_limits(const std::string& root = "");

/// Processors that this process may use: those it may run on, or as many as its control group's share of time keeps busy.
int processors();

}  // namespace core
}  // namespace krait

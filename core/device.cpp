#include "core/device.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "core/dispatch.h"
#include "core/limits.h"

namespace krait::core {

void throw_no_cuda() {
  throw_error(
      "this build has no CUDA: set runtime.device=cpu, or configure on a machine with the CUDA toolkit "
      "(cmake --preset release)");
}

DeviceInfo cpu_info() {
  DeviceInfo info;
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with("model name")) {
      info.name = line.substr(line.find(':') + 2);
      break;
    }
  info.total_bytes = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGE_SIZE);
  if (const int64_t most = group_limits().memory_bytes; most > 0) info.total_bytes = std::min(info.total_bytes, most);
  return info;
}

}  // namespace krait::core

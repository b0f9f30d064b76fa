#include "core/limits.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

namespace krait::core {

namespace {

// The least that `read` finds in `group` and the groups around it. In a container the path may be the host's, of which
// only the last directory, the mount itself, is there.
template <class F>
double least_along(const std::filesystem::path& mount, const std::string& group, F read) {
  double least = std::numeric_limits<double>::infinity();
  for (std::filesystem::path rest = std::filesystem::path(group).relative_path();; rest = rest.parent_path()) {
    least = std::min(least, read(mount / rest));
    if (rest.empty()) return least;
  }
}

// Its first number, infinity where it says "max", -1 or nothing.
double number_of(std::istream& file) {
  double n = -1;
  return file >> n && n >= 0 ? n : std::numeric_limits<double>::infinity();
}
double number_of(const std::filesystem::path& path) {
  std::ifstream file(path);
  return number_of(file);
}

// cpu.max: "quota period" or "max period"
double share_of_two(const std::filesystem::path& path) {
  std::ifstream file(path / "cpu.max");
  const double quota = number_of(file), period = number_of(file);
  return period > 0 ? quota / period : std::numeric_limits<double>::infinity();
}
double share_of_one(const std::filesystem::path& path) {
  const double period = number_of(path / "cpu.cfs_period_us");
  return period > 0 ? number_of(path / "cpu.cfs_quota_us") / period : std::numeric_limits<double>::infinity();
}

}  // namespace

GroupLimits group_limits(const std::string& root) {
  const std::filesystem::path mount = root + "/sys/fs/cgroup";
  double share = std::numeric_limits<double>::infinity(), memory = share;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // number:controllers:path
    std::istringstream fields(line);
    std::string number, controllers, path;
    std::getline(fields, number, ':');
    std::getline(fields, controllers, ':');
    std::getline(fields, path);
    const auto has = [&](const std::string& name) { return ("," + controllers + ",").find("," + name + ",") != std::string::npos; };
    if (controllers.empty()) {
      share = std::min(share, least_along(mount, path, share_of_two));
      memory = std::min(memory, least_along(mount, path, [](const auto& p) { return number_of(p / "memory.max"); }));
    }
    if (has("cpu")) share = std::min(share, least_along(mount / "cpu", path, share_of_one));
    if (has("memory"))
      memory = std::min(memory, least_along(mount / "memory", path, [](const auto& p) { return number_of(p / "memory.limit_in_bytes"); }));
  }
  // Version 1 writes "no limit" as the largest number of pages.
  return {std::isfinite(share) ? share : 0, memory < 0x1p62 ? static_cast<int64_t>(memory) : 0};
}

int processors() {
  static const int n = [] {
    const double share = group_limits().processors;
    const int all = omp_get_num_procs();
    return share > 0 ? std::clamp(static_cast<int>(std::ceil(std::min(share, 1e6))), 1, all) : all;
  }();
  return n;
}

}  // namespace krait::core

#include "core/limits.h"

#include <omp.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "tests/testing/catch.h"

using namespace krait;
namespace fs = std::filesystem;

namespace {

// A root with /proc/self/cgroup and files below /sys/fs/cgroup.
struct Root {
  explicit Root(const std::string& groups) { write("proc/self/cgroup", groups); }
  ~Root() { fs::remove_all(path); }
  void write(const std::string& file, const std::string& text) const {
    fs::create_directories(fs::path(path + "/" + file).parent_path());
    std::ofstream(path + "/" + file) << text;
  }
  void limit(const std::string& file, const std::string& text) const { write("sys/fs/cgroup/" + file, text); }
  std::string path = (fs::temp_directory_path() / fmt::format("krait-limits-{}", getpid())).string();
};

}  // namespace

TEST_CASE("limits: version 2 of the control groups; the tightest of a group and those around it holds") {
  const Root root("0::/jobs/seven\n");
  CHECK(group_limits(root.path).processors == 0);
  root.limit("jobs/cpu.max", "250000 100000\n");
  root.limit("jobs/seven/cpu.max", "max 100000\n");
  root.limit("jobs/memory.max", "max\n");
  root.limit("jobs/seven/memory.max", "2147483648\n");
  CHECK(group_limits(root.path).processors == 2.5);
  CHECK(group_limits(root.path).memory_bytes == int64_t{1} << 31);
}

TEST_CASE("limits: in a container the group's path may be the host's") {
  const Root root("0::/docker/0123\n");
  root.limit("cpu.max", "50000 100000\n");
  CHECK(group_limits(root.path).processors == 0.5);
}

TEST_CASE("limits: version 1 of the control groups, one tree for each controller") {
  const Root root("4:memory:/a\n2:cpu,cpuacct:/a\n1:name=systemd:/\n");
  root.limit("cpu/a/cpu.cfs_quota_us", "-1\n");
  root.limit("cpu/a/cpu.cfs_period_us", "100000\n");
  root.limit("memory/a/memory.limit_in_bytes", "9223372036854771712\n");
  CHECK(group_limits(root.path).processors == 0);
  CHECK(group_limits(root.path).memory_bytes == 0);
  root.limit("cpu/a/cpu.cfs_quota_us", "300000\n");
  root.limit("memory/a/memory.limit_in_bytes", "1073741824\n");
  CHECK(group_limits(root.path).processors == 3);
  CHECK(group_limits(root.path).memory_bytes == int64_t{1} << 30);
}

TEST_CASE("limits: a process has one processor at least, and no more than it may run on") {
  CHECK(processors() >= 1);
  CHECK(processors() <= omp_get_num_procs());
}

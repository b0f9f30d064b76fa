#include "core/waiting.h"

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <system_error>

namespace krait {
inline namespace core {

void let_waiting_threads_sleep(char** argv) {
  if (std::getenv("GOMP_SPINCOUNT") || std::getenv("OMP_WAIT_POLICY")) return;
  std::error_code none;
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", none);
  // Rounds of 10 to 50 ns: longer than most gaps between two parallel regions, much shorter than a time slice.
  if (none || setenv("GOMP_SPINCOUNT", "2000", 1) != 0) return;
  execv(program.c_str(), argv);
}

}  // namespace core
}  // namespace krait

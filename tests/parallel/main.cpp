// Catch2's runner for programs that mpirun starts several times.
#if KRAIT_CATCH_MAJOR >= 3
#include <catch2/catch_session.hpp>
#else
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#endif

#include <cstdio>
#include <cstring>

#include "core/comm/job.h"
#include "core/device.h"
#include "tests/parallel/world.h"
#include "train/launcher.h"

namespace krait::testing {
namespace {
comm::GroupPtr the_world;
}
const comm::GroupPtr& world() { return the_world; }
}  // namespace krait::testing

namespace {

/// Why the [cuda] cases cannot run here; empty if they can.
std::string no_cuda_reason(int ranks) {
  if (krait::cuda_device_count() < ranks) return "fewer CUDA devices than ranks";
  if (ranks > 1 && krait::comm::nccl_version() == "not in this build") return "no NCCL in this build";
  return "";
}

}  // namespace

int main(int argc, char** argv) try {
  const auto launch = krait::train::detect_launch();
  for (int i = 1; i < argc; ++i) {
    const char* at = std::strstr(argv[i], "[cuda]");
    const bool selects = at && (at == argv[i] || at[-1] != '~');
    const std::string reason = selects ? no_cuda_reason(launch.world_size) : "";
    if (!reason.empty()) {
      std::printf("SKIPPED: %s\n", reason.c_str());
      return 77;
    }
  }
  krait::testing::the_world = krait::comm::init_world(launch.rank, launch.world_size, launch.local_rank);
  Catch::Session session;
  session.configData().abortAfter = 1;
  const int failed = session.run(argc, argv);
  return krait::comm::finish(failed == 0 ? 0 : 1);
} catch (const krait::Error& e) {
  std::fprintf(stderr, "error: %s\n", e.what());
  return 1;
}

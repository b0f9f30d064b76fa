#include "train/launcher.h"

#include <charconv>
#include <cstdlib>
#include <string_view>

#include "core/comm/job.h"
#include "core/error.h"
#include "train/build_info.h"

namespace krait::train {
namespace {

int read_variable(const char* name, int absent) {
  const char* text = std::getenv(name);
  if (!text) return absent;
  const std::string_view view(text);
  int value = 0;
  const auto [end, error] = std::from_chars(view.data(), view.data() + view.size(), value);
  if (error != std::errc{} || end != view.data() + view.size() || value < 0) {
    throw ConfigError(fmt::format("environment: {}: found '{}', expected a number >= 0", name, view));
  }
  return value;
}

struct Source {
  const char *launcher, *world_size, *rank, *local_rank;
};
// Variables set by the launcher of this very process come before those of an enclosing job.
// SLURM_NTASKS alone is set in a batch script too, where only one process runs; the step's count is srun's.
constexpr Source kSources[] = {
    {"environment (WORLD_SIZE)", "WORLD_SIZE", "RANK", "LOCAL_RANK"},
    {"mpirun (Open MPI)", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"},
    {"mpirun (PMI)", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"},
    {"srun (Slurm)", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"},
};

}  // namespace

Launch detect_launch() {
  for (const Source& source : kSources) {
    if (!std::getenv(source.world_size)) continue;
    Launch launch;
    launch.launcher = source.launcher;
    launch.world_size = read_variable(source.world_size, 1);
    if (launch.world_size > 1 && !std::getenv(source.rank))
      throw ConfigError(fmt::format("environment: {}={} without {}", source.world_size, launch.world_size, source.rank));
    launch.rank = read_variable(source.rank, 0);
    launch.local_rank = read_variable(source.local_rank, -1);
    if (launch.world_size < 1 || launch.rank >= launch.world_size) {
      throw ConfigError(fmt::format("environment: {}={} does not fit {}={}", source.rank, launch.rank, source.world_size,
                                    launch.world_size));
    }
    return launch;
  }
  return {};
}

comm::GroupPtr start_job(const Launch& launch) {
  return comm::init_world(launch.rank, launch.world_size, launch.local_rank,
                          fmt::format("krait {} (git {})", kVersion, git_revision()));
}

void require_single_rank(const Launch& launch) {
  if (launch.world_size == 1) return;
  throw ConfigError(fmt::format("{} started {} ranks, but this command uses one\n       try one process, without the launcher",
                                launch.launcher, launch.world_size));
}

}  // namespace krait::train

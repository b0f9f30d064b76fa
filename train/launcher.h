#pragma once
#include <string>

#include "core/comm/process_group.h"

namespace krait::train {

/// Where this process stands among those that a launcher started.
struct Launch {
  int rank = 0, world_size = 1, local_rank = -1;  // -1: the launcher does not say
  std::string launcher;  // "mpirun", "srun", "environment (WORLD_SIZE)"; empty: started alone
};

/// From the variables of Open MPI, PMI (MPICH), Slurm's srun, and RANK/WORLD_SIZE/LOCAL_RANK.
/// ConfigError for values that are not numbers or do not fit together.
Launch detect_launch();

/// All processes of the job; see comm::init_world.
comm::GroupPtr start_job(const Launch& launch);

/// ConfigError when there is more than one rank, for commands that use one: N silent copies of one run that all
/// write to one directory are what nobody wants.
void require_single_rank(const Launch& launch);

}  // namespace krait::train

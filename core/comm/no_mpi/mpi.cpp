// Jobs of several processes in a build without MPI.
#include <unistd.h>

#include "core/comm/backend.h"
#include "core/comm/background.h"
#include "core/comm/job.h"
#include "core/comm/roll_call.h"

namespace krait::comm {

GroupPtr start_mpi(int, int size, int, const std::string&) {
  throw_error(fmt::format("{} processes were started, but this build has no MPI; install libopenmpi-dev and openmpi-bin "
                          "(bash train/setup.sh does), configure again with -DKRAIT_MPI=ON and build",
                          size));
}
GroupPtr background_group(const GroupPtr& group, const Beside&) { return group; }
int multiprocessors_beside(const GroupPtr&, Device) { return 0; }
ReachableMemory reachable_memory(const GroupPtr&, Device) { return {}; }
void stop_mpi() {}
void kill_job(int status) { _exit(status); }
std::string roll_call() { return ""; }
void set_max_count(int64_t) {}
std::string mpi_version() { return "not in this build"; }

}  // namespace krait::comm

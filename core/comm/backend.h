#pragma once
#include <functional>
#include <string>

#include "core/comm/background.h"

// What job.cpp and the MPI group need of each other and of the optional libraries. A build without one of them has
// the file in no_mpi/ or no_nccl/ in its place.
namespace krait::comm {

struct JobState {
  int rank = 0, size = 1, local_rank = 0, local_size = 1;
  bool running = false;  // MPI is started and not ended
};
JobState& job_state();
std::string host_name();

// ---- MPI
/// Starts MPI, fills job_state() and returns the group of all processes.
GroupPtr start_mpi(int rank, int size, int local_rank, const std::string& version);
void stop_mpi();
/// Kills all processes of the job, this one too.
[[noreturn]] void kill_job(int status);
/// Elements per call of MPI, whose counts are 32-bit. Tests lower it.
void set_max_count(int64_t elements);

// ---- NCCL
/// Gives every member the bytes of member 0.
using Share = std::function<void(void* bytes, int64_t count)>;
/// The collectives of CUDA tensors of the group. A call of all members. barrier() and split() are not for use.
struct NcclStart {
  GroupPtr group;
  ReachableMemory reachable = {};  // of copy engines, if they were asked for and are there
};
NcclStart make_nccl_group(const ProcessGroup& group, Device device, const Share& share, const Beside& beside);

}  // namespace krait::comm

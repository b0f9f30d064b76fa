#pragma once
#include <string>

#include "core/comm/process_group.h"

namespace krait::comm {

/// All processes that a launcher started; call once, from the main thread. rank, size and local_rank are what the
/// launcher says (local_rank -1: nothing). A job of one process is a group of one and never starts MPI. Otherwise MPI is
/// started, where its own launcher has not started the processes with the other ranks at MASTER_ADDR:MASTER_PORT; Error is
/// thrown when this build lacks it, it sees another number of processes, or ranks that meet differ in `version`.
GroupPtr init_world(int rank, int size, int local_rank, const std::string& version = "");

/// Ends MPI in an orderly way after success; after failure (status is not 0) ends all ranks. Returns the status.
/// A process that exits in another way ends the job.
int finish(int status);

/// Prints "error: rank R of N (HOST): message" and ends all ranks. When several ranks fail together, the lowest one
/// speaks: the others give it time. Without a job of several processes it prints the message and exits.
[[noreturn]] void abort_job(const std::string& message, int status = 1);

int job_rank();
int job_size();
/// Among the processes on this host.
int local_rank();
int local_size();
/// The GPU for this process: the local rank's, or the only visible one (Slurm shows each task its own).
/// Error when this host has fewer GPUs than processes.
Device local_cuda_device();

/// How long a collective may take before the job is ended, in seconds. 1800, or KRAIT_COMM_TIMEOUT.
void set_timeout(double seconds);
double timeout();

/// Puts the time limit on all work queued on the device so far: for replays of graphs that contain collectives, which
/// nothing else watches. Costs one event; nothing on CPUs and in jobs of one process.
void watch_device(Device device, const std::string& what);

/// "Open MPI v4.1.4", "2.27.3"; "not in this build".
std::string mpi_version();
std::string nccl_version();

}  // namespace krait::comm

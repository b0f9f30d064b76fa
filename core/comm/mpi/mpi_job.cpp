#include <mpi.h>
#include <unistd.h>

#include "core/comm/backend.h"
#include "core/comm/job.h"
#include "core/comm/mpi/environment_launch.h"
#include "core/comm/mpi/mpi_group.h"
#include "core/comm/mpi/mpi_types.h"
#include "core/comm/mpi/roll_call_thread.h"

namespace krait::comm {

namespace {
std::unique_ptr<RollCallThread> roll_call_thread;
Star* star = nullptr;  // where MPI's own launcher is not there
GroupPtr at_end;  // all ranks again, so that the wait for the last one matches no other call
}  // namespace

GroupPtr start_mpi(int rank, int size, int local_rank, const std::string& version) {
  star = meet_by_environment(rank, size, version);
  if (star) job_state() = {rank, size, local_rank, 1, true};  // from here on an error ends the others
  int level = 0;
  MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &level);  // the watchdog may end the job from its thread
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  int mpi_size = 0, mpi_rank = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &mpi_size);
  MPI_Comm_rank(MPI_COMM_WORLD, &mpi_rank);
  if (mpi_size != size || mpi_rank != rank) {
    if (star) star->fail(fmt::format("{} sees {} ranks of {}; start the job with mpirun", mpi_version(), mpi_size, size));
    MPI_Finalize();
    throw_error(fmt::format(
        "the launcher says rank {} of {}, but {} sees rank {} of {}; start the job with the mpirun of this MPI, or with "
        "srun --mpi=pmix, and without RANK and WORLD_SIZE of another launcher", rank, size, mpi_version(), mpi_rank, mpi_size));
  }
  MPI_Comm host;
  check_mpi(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &host), "MPI_Comm_split_type");
  int local_size = 0, rank_on_host = 0;
  MPI_Comm_size(host, &local_size);
  MPI_Comm_rank(host, &rank_on_host);
  MPI_Comm_free(&host);
  if (local_rank < 0) local_rank = rank_on_host;
  job_state() = {rank, size, local_rank, local_size, true};
  if (level == MPI_THREAD_MULTIPLE) roll_call_thread = std::make_unique<RollCallThread>();
  MPI_Comm all;
  check_mpi(MPI_Comm_dup(MPI_COMM_WORLD, &all), "MPI_Comm_dup");
  at_end = std::make_shared<MpiGroup>(all, "the end of the job");
  return std::make_shared<MpiGroup>(MPI_COMM_WORLD, "world");
}

// MPI_Finalize has no time limit.
void stop_mpi() {
  at_end->barrier();
  job_state().running = false;
  roll_call_thread.reset();
  MPI_Finalize();
  if (star) star->leave();
}

void kill_job(int status) {
  (void)roll_call_thread.release();  // it may be the one that holds what its end would wait for
  if (star) star->end_job(status);
  MPI_Abort(MPI_COMM_WORLD, status);
  _exit(status);
}

std::string mpi_version() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = "";
  int length = 0;
  MPI_Get_library_version(text, &length);
  const std::string all(text, static_cast<size_t>(length));
  std::string version;  // of its first line, in which MPICH has a tab and Open MPI goes on with the builder's name
  for (const char c : all.substr(0, all.find_first_of(",\n"))) {
    const bool space = c == ' ' || c == '\t';
    if (!space || (!version.empty() && version.back() != ' ')) version += space ? ' ' : c;
  }
  return version;
}

}  // namespace krait::comm

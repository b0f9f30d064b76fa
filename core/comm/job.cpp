#include "core/comm/job.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "core/comm/backend.h"

namespace krait::comm {
namespace {

constexpr double kDefaultTimeout = 1800;

double initial_timeout() {
  const char* text = std::getenv("KRAIT_COMM_TIMEOUT");
  if (!text) return kDefaultTimeout;
  char* end = nullptr;
  const double seconds = std::strtod(text, &end);
  KRAIT_CHECK(end != text && *end == 0 && seconds > 0, "environment: KRAIT_COMM_TIMEOUT: found '{}', expected seconds",
              text);
  return seconds;
}

std::atomic<double>& timeout_slot() {
  static std::atomic<double> seconds{initial_timeout()};
  return seconds;
}

// Somebody called exit() in the middle: the other ranks would wait for this one.
void end_at_exit() {
  if (job_state().running) abort_job("the process exits before the job's end");
}

}  // namespace

JobState& job_state() {
  static JobState state;
  return state;
}

std::string host_name() {
  char name[256] = "";
  gethostname(name, sizeof(name) - 1);
  return name;
}

GroupPtr init_world(int rank, int size, int local_rank, const std::string& version) {
  KRAIT_CHECK(!job_state().running, "the job was started twice");
  if (size == 1) return single_group("world");
  timeout();  // a bad KRAIT_COMM_TIMEOUT is reported here, not in the first collective
  GroupPtr world = start_mpi(rank, size, local_rank, version);
  std::atexit(end_at_exit);
  return world;
}

int finish(int status) {
  if (!job_state().running) return status;
  if (status != 0) abort_job(fmt::format("ends with status {}", status), status);
  stop_mpi();
  return 0;
}

void abort_job(const std::string& message, int status) {
  static std::atomic<bool> ending{false};
  if (ending.exchange(true))  // another thread is at it
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  const JobState& job = job_state();
  std::fflush(stdout);
  if (!job.running) {
    std::fprintf(stderr, "error: %s\n", message.c_str());
    std::fflush(stderr);
    _exit(status);
  }
  // The launcher ends the others with SIGTERM once the lowest rank has spoken.
  std::signal(SIGTERM, SIG_DFL);
  std::this_thread::sleep_for(std::chrono::milliseconds(200) * std::min(job.rank, 50));
  const std::string line =
      fmt::format("error: rank {} of {} ({}): {}\n", job.rank, job.size, host_name(), message);
  std::fputs(line.c_str(), stderr);
  std::fflush(stderr);
  kill_job(status);
}

int job_rank() { return job_state().rank; }
int job_size() { return job_state().size; }
int local_rank() { return job_state().local_rank; }
int local_size() { return job_state().local_size; }

Device local_cuda_device() {
  const JobState& job = job_state();
  const int count = cuda_device_count();
  if (count == 1) return cuda_device(0);
  KRAIT_CHECK(count > 0, "host {}: no CUDA device found; set runtime.device=cpu", host_name());
  KRAIT_CHECK(job.local_size <= count, "host {}: {} processes for {} CUDA devices; start at most {} on a host", host_name(),
              job.local_size, count, count);
  return cuda_device(job.local_rank);
}

void set_timeout(double seconds) {
  KRAIT_CHECK(seconds > 0, "the time limit of collectives must be positive, found {}", seconds);
  timeout_slot() = seconds;
}
double timeout() { return timeout_slot(); }

}  // namespace krait::comm

#include "core/comm/mpi/environment_launch.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <filesystem>

#include "core/comm/job.h"
#include "core/comm/mpi/pmi.h"
#include "core/error.h"

extern char** environ;

namespace krait::comm {
namespace {

constexpr double kMeetingLimits[] = {8, 300};  // seconds, around the time limit of a collective
constexpr int kBesideTorchrun = 1000;

std::string variable(const char* name) {
  const char* text = std::getenv(name);
  return text ? text : "";
}

bool says(const char* name, int value) { return variable(name) == std::to_string(value); }

// An enclosing job's variables have other numbers.
bool mpi_launched(int rank, int size) {
  return (says("OMPI_COMM_WORLD_RANK", rank) && says("OMPI_COMM_WORLD_SIZE", size)) ||
         (says("PMI_RANK", rank) && says("PMI_SIZE", size)) ||
         (says("PMIX_RANK", rank) && says("SLURM_STEP_NUM_TASKS", size));
}

int read_port(const char* name) {
  const std::string text = variable(name);
  int port = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), port);
  if (error != std::errc{} || end != text.data() + text.size() || port < 1 || port > 65535)
    throw ConfigError(fmt::format("environment: {}: found '{}', expected a port, 1 to 65535", name, text));
  return port;
}

// torchrun itself listens at MASTER_PORT.
int meeting_port() {
  if (std::getenv("KRAIT_RENDEZVOUS_PORT")) return read_port("KRAIT_RENDEZVOUS_PORT");
  const int port = read_port("MASTER_PORT");
  if (!std::getenv("TORCHELASTIC_RUN_ID")) return port;
  return port + kBesideTorchrun <= 65535 ? port + kBesideTorchrun : port - kBesideTorchrun;
}

void forget_enclosing_job() {
  std::vector<std::string> names;
  for (char** entry = environ; *entry; ++entry) {
    const std::string_view text(*entry);
    for (const char* prefix : {"OMPI_COMM_WORLD_", "OMPI_MCA_orte_", "OMPI_MCA_ess", "OMPI_MCA_pmix", "PMIX_", "PMI_"})
      if (text.starts_with(prefix)) names.emplace_back(text.substr(0, text.find('=')));
  }
  for (const std::string& name : names) unsetenv(name.c_str());
}

// Open MPI 3 and 4 ask the PMI library of a job of Flux, which a variable names. The empty name is this very program,
// in which dlopen finds PMI_*.
void pose_as_flux(const Star& star) {
  forget_enclosing_job();
  setenv("FLUX_JOB_ID", std::to_string(star.job()).c_str(), 1);
  setenv("FLUX_PMI_LIBRARY_PATH", "", 1);
  setenv("OMPI_MCA_mpi_yield_when_idle", "1", 0);
}

// A killed process leaves MPI's shared memory behind, which mpirun would remove.
void keep_files_together(Star& star) {
  const std::string directory = fmt::format("/dev/shm/krait-{}-{}", getuid(), star.job());
  if (mkdir(directory.c_str(), 0700) != 0 && errno != EEXIST) return;
  setenv("OMPI_MCA_btl_vader_backing_directory", directory.c_str(), 0);
  setenv("OMPI_MCA_orte_tmpdir_base", directory.c_str(), 0);
  star.before_exit([directory] {
    std::error_code ignored;  // the other ranks do the same
    std::filesystem::remove_all(directory, ignored);
  });
}

}  // namespace

std::string environment_refusal(const std::string& mpi, int size) {
  if (mpi.starts_with("Open MPI v3.") || mpi.starts_with("Open MPI v4.")) return "";
  return fmt::format("{} takes no job that RANK and WORLD_SIZE describe (Open MPI 3 and 4 do)\n       start the job "
                     "with mpirun -n {}",
                     mpi, size);
}

Star* meet_by_environment(int rank, int size, const std::string& version) {
  if (mpi_launched(rank, size)) return nullptr;
  const std::string host = variable("MASTER_ADDR");
  if (host.empty()) {
    if (!std::getenv("WORLD_SIZE")) return nullptr;
    throw ConfigError(
        fmt::format("environment: WORLD_SIZE={} without MASTER_ADDR, the host of RANK=0\n       set it and "
                    "MASTER_PORT, or start the job with mpirun -n {}",
                    size, size));
  }
  const std::string mpi = mpi_version();
  auto* star = new Star({.host = host,
                         .port = meeting_port(),
                         .rank = rank,
                         .size = size,
                         .version = (version.empty() ? "" : version + " with ") + mpi,
                         .limit = std::clamp(timeout(), kMeetingLimits[0], kMeetingLimits[1])});
  if (const std::string refusal = environment_refusal(mpi, size); !refusal.empty()) star->fail(refusal);
  pose_as_flux(*star);
  keep_files_together(*star);
  serve_pmi(*star, rank, size);
  return star;
}

}  // namespace krait::comm

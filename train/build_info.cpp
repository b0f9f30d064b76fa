#include "train/build_info.h"

#include <CLI/Version.hpp>
#include <H5public.h>
#include <cblas.h>
#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "core/comm/job.h"
#include "core/device.h"
#include "data/hdf5.h"

#ifndef KRAIT_GIT_REVISION
#define KRAIT_GIT_REVISION "unknown"
#endif

namespace krait::train {
namespace {

// Whatever OpenBLAS says of itself; other BLAS libraries have no such call.
extern "C" char* openblas_get_config(void) __attribute__((weak));

}  // namespace

std::string git_revision() { return KRAIT_GIT_REVISION; }

std::vector<std::pair<std::string, std::string>> build_info() {
  const std::lock_guard lock(data::hdf5::mutex());
  unsigned major = 0, minor = 0, patch = 0;
  const bool has_hdf5 = H5get_libversion(&major, &minor, &patch) >= 0;
  return {
      {"krait", fmt::format("{} (git {})", kVersion, git_revision())},
      {"compiler", __VERSION__},
      {"cuda", built_with_cuda() ? "built in" : "not in this build"},
      {"nccl", comm::nccl_version()},
      {"mpi", comm::mpi_version()},
      {"blas", openblas_get_config ? openblas_get_config() : "CBLAS"},
      {"hdf5", has_hdf5 ? fmt::format("{}.{}.{}", major, minor, patch) : "unknown"},
      {"fmt", fmt::format("{}.{}.{}", FMT_VERSION / 10000, FMT_VERSION / 100 % 100, FMT_VERSION % 100)},
      {"nlohmann-json", fmt::format("{}.{}.{}", NLOHMANN_JSON_VERSION_MAJOR, NLOHMANN_JSON_VERSION_MINOR, NLOHMANN_JSON_VERSION_PATCH)},
      {"cli11", CLI11_VERSION},
  };
}

}  // namespace krait::train

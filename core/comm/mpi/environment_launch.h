#pragma once
#include <string>

#include "core/comm/mpi/star.h"

namespace krait::comm {

/// Where something that is no launcher of MPI's (torchrun, a loop in a shell) has set MASTER_ADDR and MASTER_PORT:
/// meets the other ranks there and makes MPI start as one job with them. Null: MPI's own launcher is there, or nothing
/// is said. Before MPI is started. Error for values that are missing or do not fit.
Star* meet_by_environment(int rank, int size, const std::string& version);
/// Why an MPI of that version starts no such job; empty if it does.
std::string environment_refusal(const std::string& mpi_version, int size);

}  // namespace krait::comm

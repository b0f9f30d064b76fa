#pragma once
#include <nccl.h>

#include <source_location>

#include "core/cuda/check.h"

namespace krait::comm {

/// Every NCCL call goes through here: Error with NCCL's own account of what went wrong.
void check(ncclResult_t status, std::source_location where = std::source_location::current());
using core::check;

}  // namespace krait::comm

#pragma once
#include <cuda_runtime_api.h>

#include <source_location>

#include "core/error.h"

namespace krait {
inline namespace core {

/// Every CUDA call goes through here. The message names the error and the place; out of memory says what to do.
void check(cudaError_t status, std::source_location where = std::source_location::current());

}  // namespace core
}  // namespace krait

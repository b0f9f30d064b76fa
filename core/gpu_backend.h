#pragma once
#include "core/dispatch.h"

/// Declares functions in namespace cuda alone: for operations that have one kernel on a GPU, and on a CPU are composed of
/// others. Outputs of theirs that say what was done keep, on a CPU, what the caller put there.
#define KRAIT_GPU_BACKEND(...) \
  namespace cuda {             \
  __VA_ARGS__;                 \
  }

/// Calls cuda::f(...) for a device that is a GPU, and nothing for a CPU.
#if KRAIT_WITH_CUDA
#define KRAIT_DISPATCH_GPU(device, ...)        \
  do {                                         \
    if ((device).is_cuda()) cuda::__VA_ARGS__; \
  } while (false)
#else
#define KRAIT_DISPATCH_GPU(device, ...)                         \
  do {                                                          \
    if ((device).is_cuda()) ::krait::core::throw_no_cuda();     \
  } while (false)
#endif

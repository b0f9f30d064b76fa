#pragma once
#include "core/device.h"

namespace krait {
inline namespace core {
[[noreturn]] void throw_no_cuda();
}
}  // namespace krait

/// Declares the same functions in the namespaces cpu and cuda; separate several with semicolons.
#define KRAIT_BACKENDS(...) \
  namespace cpu {           \
  __VA_ARGS__;              \
  }                         \
  namespace cuda {          \
  __VA_ARGS__;              \
  }

/// Calls cpu::f(...) or cuda::f(...) of the enclosing namespace. Without CUDA in the build it names the fix.
#if KRAIT_WITH_CUDA
#define KRAIT_DISPATCH(device, ...) \
  do {                              \
    if ((device).is_cpu())          \
      cpu::__VA_ARGS__;             \
    else                            \
      cuda::__VA_ARGS__;            \
  } while (false)
#else
#define KRAIT_DISPATCH(device, ...)          \
  do {                                       \
    if (!(device).is_cpu())                  \
      ::krait::core::throw_no_cuda();        \
    cpu::__VA_ARGS__;                        \
  } while (false)
#endif

#pragma once
#include <cstdint>

namespace krait::kernels::cpu {

/// Bytes of a vector register of the instruction set that is compiled for. Wider vector types compile to several
/// registers, but functions that return them have no agreed calling convention (GCC: -Wpsabi).
#if defined(__AVX512F__)
inline constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX__)
inline constexpr int64_t kVectorBytes = 32;
#else
inline constexpr int64_t kVectorBytes = 16;
#endif

}  // namespace krait::kernels::cpu

#pragma once
#include "core/dtype.h"

namespace krait::kernels::cpu {

/// to = value, converted. GCC 12 does not vectorise a loop that assigns a whole bf16 (an aggregate); it does when its
/// bits are assigned.
template <class T, class A>
[[gnu::always_inline]] inline void put(T& to, A value) {
  if constexpr (std::is_same_v<T, bf16>)
    to.bits = bf16(static_cast<float>(value)).bits;
  else
    to = static_cast<T>(value);
}

}  // namespace krait::kernels::cpu

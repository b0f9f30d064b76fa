#pragma once
// What kernels that draw dropout masks share.
#include <cstdint>

#include "kernels/dropout.h"

namespace krait::kernels::cuda {

// y of one element.
template <class T, class A>
__device__ __forceinline__ T dropped(uint32_t word, uint32_t threshold, T x, const T* residual, A scale) {
  const bool drop = (word >> 8) < threshold;
  const A value = static_cast<A>(x);
  if (!residual) return static_cast<T>(drop ? A(0) : value * scale);
  const A base = static_cast<A>(*residual);
  return static_cast<T>(drop ? base : ::fma(value, scale, base));  // one fused multiply-add, as on the CPU
}

/// What one Philox block numbers.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

template <class T>
const Four<T>* fours(const T* p) {
  return reinterpret_cast<const Four<T>*>(p);
}
template <class T>
Four<T>* fours(T* p) {
  return reinterpret_cast<Four<T>*>(p);
}

/// Whether the mask is one run whose Philox blocks are the groups of four of n elements, which all (null ones aside)
/// lie on boundaries of a group.
template <class... P>
bool in_fours(const DropoutMask& mask, int64_t n, const P*... pointers) {
  return mask.run_of(n) == n && n % 4 == 0 && mask.offset % 4 == 0 &&
         ((reinterpret_cast<uintptr_t>(pointers) % (4 * sizeof(P)) == 0) && ...);
}

}  // namespace krait::kernels::cuda

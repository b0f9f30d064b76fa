#pragma once
#include <cstdint>

#include "core/tensor.h"

namespace krait::kernels::cuda {

/// Whether every tensor (undefined ones aside) may be read from its start in 16-byte pieces.
template <class... T>
bool aligned(const T&... tensors) {
  return ((!tensors.defined() || reinterpret_cast<uintptr_t>(tensors.raw_data()) % 16 == 0) && ...);
}

template <class T>
T* pointer_or_null(const Tensor& t) {
  return t.defined() ? t.data<T>() : nullptr;
}

}  // namespace krait::kernels::cuda

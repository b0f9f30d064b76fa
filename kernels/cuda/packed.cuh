#pragma once
#include "core/dtype.h"

namespace krait::kernels::cuda {

/// V values of T that are read and written in 16-byte pieces and stay packed in registers until unpacked.
/// With V * sizeof(T) below 16 they travel one by one, without alignment.
template <class T, int V>
struct Packed {
  static constexpr bool kWide = V * sizeof(T) % 16 == 0;
  static constexpr int kWords = kWide ? V * sizeof(T) / 16 : 1;

  __device__ __forceinline__ void load(const T* from) {
    if constexpr (kWide) {
#pragma unroll
      for (int k = 0; k < kWords; ++k) words_[k] = reinterpret_cast<const uint4*>(from)[k];
    } else {
      T values[V];
#pragma unroll
      for (int k = 0; k < V; ++k) values[k] = from[k];
      __builtin_memcpy(words_, values, sizeof(values));
    }
  }
  __device__ __forceinline__ void store(T* to) const {
    if constexpr (kWide) {
#pragma unroll
      for (int k = 0; k < kWords; ++k) reinterpret_cast<uint4*>(to)[k] = words_[k];
    } else {
      T values[V];
      __builtin_memcpy(values, words_, sizeof(values));
#pragma unroll
      for (int k = 0; k < V; ++k) to[k] = values[k];
    }
  }
  template <class A>
  __device__ __forceinline__ void unpack(A (&out)[V]) const {
    T values[V];
    __builtin_memcpy(values, words_, sizeof(values));
#pragma unroll
    for (int k = 0; k < V; ++k) out[k] = static_cast<A>(values[k]);
  }
  template <class A>
  __device__ __forceinline__ void pack(const A (&in)[V]) {
    T values[V];
#pragma unroll
    for (int k = 0; k < V; ++k) values[k] = static_cast<T>(in[k]);
    __builtin_memcpy(words_, values, sizeof(values));
  }

 private:
  uint4 words_[kWords];
};

template <int V, class T, class A>
__device__ __forceinline__ void load_values(A (&out)[V], const T* from) {
  Packed<T, V> packed;
  packed.load(from);
  packed.unpack(out);
}

template <int V, class T, class A>
__device__ __forceinline__ void store_values(T* to, const A (&in)[V]) {
  Packed<T, V> packed;
  packed.pack(in);
  packed.store(to);
}

/// Whether every pointer (null ones aside) may be read in 16-byte pieces.
template <class... P>
bool aligned16(const P*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace krait::kernels::cuda

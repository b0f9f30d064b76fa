#pragma once
#include "kernels/epilogue.h"

namespace krait::kernels::cuda {

/// For maps of few rows, which are bound by reading weights.
struct EpilogueMath {
  static __device__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }
  static __device__ float erf(float x) { return erff(x); }
  static __device__ float exp(float x) { return __expf(x); }
};

/// The epilogue is known at run time only.
__device__ __forceinline__ float activate_as(Epilogue e, float x) {
  if (e == Epilogue::gelu_tanh) return activate<EpilogueMath, Epilogue::gelu_tanh>(x);
  if (e == Epilogue::gelu_erf) return activate<EpilogueMath, Epilogue::gelu_erf>(x);
  return e == Epilogue::relu ? activate<EpilogueMath, Epilogue::relu>(x) : x;
}

}  // namespace krait::kernels::cuda

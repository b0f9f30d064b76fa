#pragma once
#include <cublasLt.h>

#include <source_location>

#include "kernels/linear.h"

namespace krait {
namespace kernels {
namespace cuda {

void check(cublasStatus_t status, std::source_location where = std::source_location::current());

/// What cuBLASLt does to a product before writing it. bias (n) and pre (m, n; rows n apart) have the product's dtype.
struct Fusion {
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  const void* bias = nullptr;
  void* pre = nullptr;
};

/// Queues the product; false, with nothing queued, when the library has no kernel for this fusion.
bool try_gemm(const Gemm& g, const Fusion& fusion);

}  // namespace cuda
}  // namespace kernels
}  // namespace krait

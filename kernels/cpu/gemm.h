#pragma once
#include <cstdint>
#include <functional>

#include "kernels/matmul.h"

namespace krait {
namespace kernels {
namespace cpu {

/// A matrix in memory: element (i, j) at data[i * row_stride + j * col_stride]; one of the strides is 1.
struct MatrixRef {
  const float* data;
  int64_t row_stride, col_stride;
};

/// Called by the thread that has just written rows [i0, i1) x columns [j0, j1) of c for the last time, while the
/// block is still in its cache: for bias and activation.
using BlockDone = std::function<void(int64_t i0, int64_t i1, int64_t j0, int64_t j1)>;

/// c (m, n; rows ldc apart) = alpha a b + beta c, with a (m, k), b (k, n) in fp32; beta = 0 does not read c.
/// Every element of c is summed over k in one fixed order, so the thread count does not show in the result.
void sgemm(int64_t m, int64_t n, int64_t k, float alpha, MatrixRef a, MatrixRef b, float beta, float* c, int64_t ldc,
           const BlockDone& done = {});

/// Whether gemm() serves this fp32 product with sgemm, and that product with a callback.
bool blocked(const Gemm& g);
void blocked_product(const Gemm& g, const BlockDone& done);

}  // namespace cpu
}  // namespace kernels
}  // namespace krait

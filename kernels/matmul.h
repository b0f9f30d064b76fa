#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// Whether fp32 products on CUDA may round their inputs to TF32 (10 bits of mantissa, eight times the rate).
/// Off: true fp32. Process-wide; set before work is queued or captured.
void set_tf32(bool on);
bool tf32();
/// Multiprocessors that something beside the products takes (collectives): kernels that divide a GPU among themselves
/// leave them alone. Process-wide, 0 at first.
void set_spare_multiprocessors(int n);
int spare_multiprocessors();

/// op(a) op(b) over the last two dimensions: op(a) (..., m, k), op(b) (..., k, n) -> (..., m, n), where op swaps the
/// last two dimensions when trans_* is set. Leading dimensions broadcast. fp32, bf16 (sums in fp32) or fp64.
/// Slices and transposes are read in place wherever BLAS can express their strides.
Tensor matmul(const Tensor& a, const Tensor& b, bool trans_a = false, bool trans_b = false);

/// c = alpha op(a) op(b) + beta c; beta = 0 does not read c. c has the dtype of a and b, or is fp32 when they are
/// bf16. Leading dimensions that are 1 (or missing) in c but larger in a or b are summed over.
void matmul_out(Tensor& c, const Tensor& a, const Tensor& b, bool trans_a = false, bool trans_b = false,
                double alpha = 1.0, double beta = 0.0);

/// A strided batch of row-major products: c[i] (m, n) = alpha op(a[i]) op(b[i]) + beta c[i]. A matrix's rows lie ld
/// elements apart; with trans set the stored matrix is op's transpose. All sizes positive.
struct Gemm {
  Device device;
  DType dtype, c_dtype;
  int64_t m, n, k, batch = 1;
  const void* a;
  const void* b;
  void* c;
  bool trans_a, trans_b;
  int64_t lda, ldb, ldc;
  int64_t batch_a = 0, batch_b = 0, batch_c = 0;  // elements between batch entries
  double alpha = 1.0, beta = 0.0;
};
/// The product of two matrices (2-d) whose strides BLAS can express (blas_ready), into a contiguous c.
Gemm gemm_of(Tensor& c, const Tensor& a, const Tensor& b, bool trans_a, bool trans_b);
/// t, or a contiguous copy when the strides of its last two dimensions are beyond BLAS.
Tensor blas_ready(const Tensor& t);

KRAIT_BACKENDS(void gemm(const Gemm& g))

}  // namespace kernels
}  // namespace krait

#pragma once
#include "core/gpu_backend.h"
#include "kernels/linear.h"

namespace krait {
namespace kernels {

// What lies between the two maps of a feed-forward layer. A GPU applies it to the results of the products before they
// leave the chip, forward to the first map's, backward to the second's.

/// Gated units (Shazeer 2020): pre = x w^T + bias = [gate; up], h = silu(gate) up.
/// x (..., in), w (2f, in), bias (2f) or undefined; pre (..., 2f), h (..., f). fp32, bf16 or fp64, same dtype and device.
struct GatedUnits {
  Tensor h, pre;
};
GatedUnits gated_units_forward(const Tensor& x, const Tensor& w, const Tensor& bias);

/// The gradient of pre where h was mapped by w (out, f) and dy (..., out) is the gradient of that:
///   plain, h = epilogue(pre):    dpre = (dy w) epilogue'(pre)
///   gated:                       dpre = [dh up silu'(gate); dh silu(gate)], dh = dy w
/// dh is rounded to its dtype. db: the sum of dpre over rows; with db_sum (fp32, or the dtype of w) it is added there and
/// db is that buffer. Sums run in a fixed order.
struct UnitsGrad {
  Tensor dpre, db;
};
UnitsGrad units_backward(const Tensor& dy, const Tensor& w, const Tensor& pre, Epilogue epilogue, bool want_db,
                         const Tensor& db_sum = {});
Tensor gated_units_backward(const Tensor& dy, const Tensor& w, const Tensor& pre);

// On a GPU: done says whether it does it in the products; else nothing was written. Matrices, contiguous but for w, whose
// strides BLAS can express. product: x w^T into pre.
KRAIT_GPU_BACKEND(void gated_units_forward(bool& done, Tensor& h, Tensor& pre, const Gemm& product);
                  void units_backward(bool& done, Tensor& dpre, Tensor& db, bool add_db, const Tensor& dy, const Tensor& w,
                                      const Tensor& pre, Epilogue epilogue);
                  void gated_units_backward(bool& done, Tensor& dpre, const Tensor& dy, const Tensor& w, const Tensor& pre))

}  // namespace kernels
}  // namespace krait

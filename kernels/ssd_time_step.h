#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// Time steps and log decays of Mamba-2 (Dao & Gu 2024, section 7.1), per head:
///   u = dt + bias     s = log(1 + e^u)     dt' = clamp(s, low, high)     a = -e^{A_log} dt'
/// Backward, where low <= s <= high (elsewhere 0):
///   ddt = (ddt' - e^{A_log} da) sigmoid(u)     dbias = sum ddt     dA_log = -e^{A_log} sum da dt'  (clamped ones too)
struct SsdTimeStepOut { Tensor dt, a; };
struct SsdTimeStepGrad { Tensor ddt, dbias, dA_log; };

/// dt (..., h): fp32, bf16 or fp64; rows may be apart (a slice of a wider projection). bias, A_log (h): any floating
/// dtype. Results and sums in fp32 (fp64 for fp64), contiguous.
SsdTimeStepOut ssd_time_step_forward(const Tensor& dt, const Tensor& bias, const Tensor& A_log, double low, double high);
/// dstep (of dt') and da may be undefined (0). ddt like dt, or written to ddt_into (rows may be apart); dbias and dA_log
/// in the dtype of sums, summed in an order that depends on the shape alone.
SsdTimeStepGrad ssd_time_step_backward(const Tensor& dstep, const Tensor& da, const Tensor& dt, const Tensor& bias,
                                       const Tensor& A_log, double low, double high, const Tensor& ddt_into = {});

// Backends: matrices (r, h) that are contiguous but for the rows of dt and ddt; bias and A_log in the dtype of sums.
KRAIT_BACKENDS(void ssd_time_step_forward(Tensor& step, Tensor& a, const Tensor& dt, const Tensor& bias,
                                          const Tensor& A_log, double low, double high);
               void ssd_time_step_backward(Tensor& ddt, Tensor& dbias, Tensor& dA_log, const Tensor& dstep,
                                           const Tensor& da, const Tensor& dt, const Tensor& bias, const Tensor& A_log,
                                           double low, double high))

}  // namespace kernels
}  // namespace krait

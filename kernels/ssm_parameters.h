#pragma once
#include "core/tensor.h"

namespace krait::kernels {

/// What S4's and S4D's kernels ask of their parameters, for messages of `name`: fp32 or fp64, log_dt (h), log_A_re and
/// A_im (s, n) with s sets for h channels, B (s, n, 2), C (h, n, 2).
void check_ssm_parameters(const char* name, const Tensor& log_dt, const Tensor& log_A_re, const Tensor& A_im, const Tensor& B, const Tensor& C);

}  // namespace krait::kernels

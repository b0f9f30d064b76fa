#pragma once
#include "kernels/linear.h"

namespace krait::kernels::cuda {

/// y = epilogue(x w^T + bias) for up to 8 rows of x: bound by reading w once. False, with nothing queued, where it
/// does not serve.
bool linear_few_rows(Tensor& y, const Gemm& g, const Tensor& bias, Epilogue epilogue);

}  // namespace krait::kernels::cuda

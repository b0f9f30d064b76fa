#pragma once
#include "kernels/linear.h"

namespace krait::kernels::cuda {

/// y = epilogue(x w^T + bias) for few rows of x: bound by reading w once. False, with nothing queued, where it
/// does not serve.
bool linear_few_rows(Tensor& y, const Gemm& g, const Tensor& bias, Epilogue epilogue);

/// The same on tensor cores, for up to 64 rows in bf16 and not too many columns; linear_few_rows turns to it.
bool linear_batch_rows(Tensor& y, const Gemm& g, const Tensor& bias, Epilogue epilogue);

}  // namespace krait::kernels::cuda

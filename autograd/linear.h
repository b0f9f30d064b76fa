#pragma once
#include "autograd/variable.h"
#include "kernels/linear.h"

namespace krait {
inline namespace autograd {

using kernels::Epilogue;

/// epilogue(x w^T + bias): x (..., in), w (out, in), bias (out) or undefined.
/// Where w or bias accumulates in place, its gradient is added straight into its buffer (fp32 for bf16 weights).
Variable linear(const Variable& x, const Variable& w, const Variable& bias = {}, Epilogue epilogue = Epilogue::none);

/// op(a) op(b) over the last two dimensions, leading ones broadcast; see kernels/matmul.h.
Variable matmul(const Variable& a, const Variable& b, bool trans_a = false, bool trans_b = false);

}  // namespace autograd
}  // namespace krait

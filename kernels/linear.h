#pragma once
#include "kernels/matmul.h"

namespace krait {
namespace kernels {

/// What follows a linear map, elementwise. gelu_tanh is GPT-2's 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))),
/// gelu_erf is 0.5 x (1 + erf(x / sqrt 2)).
enum class Epilogue : uint8_t { none, gelu_tanh, gelu_erf, relu };

/// pre = x w^T + bias        y = epilogue(pre)
/// x (..., in), w (out, in), bias (out) or undefined; fp32, bf16 or fp64, same dtype and device.
/// y (..., out). pre, which the backward needs, only when asked for and there is an epilogue.
struct LinearOut {
  Tensor y, pre;
};
LinearOut linear_forward(const Tensor& x, const Tensor& w, const Tensor& bias, Epilogue epilogue, bool save_pre);

/// g = dy epilogue'(pre)     dx = g w     dw = g^T x     db = sum of g over rows (in fp32; fp64 for fp64)
/// Only what is wanted is computed; the rest stays undefined. dw_sum and db_sum, when defined, are buffers
/// (fp32, or the dtype of w) that are added to, and dw or db is then that buffer.
struct LinearGrad {
  Tensor dx, dw, db;
};
struct LinearWants {
  bool dx = true, dw = true, db = false;
};
LinearGrad linear_backward(const Tensor& dy, const Tensor& x, const Tensor& w, const Tensor& pre, Epilogue epilogue,
                           LinearWants wants, const Tensor& dw_sum = {}, const Tensor& db_sum = {});

/// The backends see matrices: y, pre, dy (r, out) contiguous. linear_forward computes g's product into y first.
/// linear_gradient: g = dy epilogue'(pre), unless g is undefined (then dy is g); db (or +=) column sums of g, unless
/// undefined. Sums are made over fixed blocks of rows in a fixed order.
KRAIT_BACKENDS(void linear_forward(Tensor& y, Tensor& pre, const Gemm& product, const Tensor& bias, Epilogue epilogue);
               void linear_gradient(Tensor& g, Tensor& db, const Tensor& dy, const Tensor& pre, Epilogue epilogue,
                                    bool add_db))

}  // namespace kernels
}  // namespace krait

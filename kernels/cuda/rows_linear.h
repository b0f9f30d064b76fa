#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/stream.h"
#include "kernels/linear.h"

namespace krait::kernels::cuda {

/// RMSNorm whose rows were left unscaled by what made them: x = values * weight, rounded, and squares (rows, parts), whose
/// sums over a row are those of values^2. A row's factor is (sum / width + eps)^(-1/2).
struct RowScale {
  const float* squares;  // null: no norm
  int parts;
  float eps;
  bf16* normed;  // (rows, k), where the scaled rows go as well
  float* rstd;   // may be null
};

/// A linear map of a decoding step with what stands before and behind it, all matrices bf16:
///   y = epilogue(scale x w^T + bias)
///   with `units`: w (n, k) gates first, units (rows, n / 2) = silu(gate) up; neither bias nor epilogue
///   with a residual: sum = residual + y, and for the norm behind it weighted = sum * weight, squares (rows,
///   rows_linear_blocks())
///   with a convolution of four taps over the columns [conv_begin, conv_end) of y: mixed = silu(conv(y)), whose state
///   moves on by one
///   with `project` (outputs, channels) and conv_begin 0: part (rows, parts, outputs), where part i is project's product
///   with the i-th projected_columns() columns of mixed.
struct RowsLinear {
  const bf16 *x, *w, *bias;
  bf16* y;
  int64_t x_row, y_row;  // elements between rows
  int rows, n, k;
  Epilogue epilogue;
  RowScale scale;
  const bf16* residual;
  const float* weight;
  bf16 *sum, *weighted;
  float* squares;
  bf16 *conv, *mixed;
  const bf16 *conv_weight, *conv_bias;
  int conv_begin, conv_end;
  const bf16* project;
  float* part;
  int outputs;
  bf16* units;  // null: not gated
  bool beside;  // leave registers to kernels behind it that bring a large state early
};

/// Whether sizes and addresses suit the kernel.
bool rows_linear_fits(const RowsLinear& a);
int projected_columns(const RowsLinear& a);
/// Parts of a row's squares.
int rows_linear_blocks(const RowsLinear& a);
/// Weights, convolution filters and the convolution's state are read before the kernel in front has finished: what wrote
/// them must be further back. When the next kernel begins, all in front of this one have finished.
void rows_linear(const RowsLinear& a, Stream stream);

/// normed and rstd of x (rows, k).
void scale_rows(const RowScale& scale, const bf16* x, int rows, int k, Stream stream);

}  // namespace krait::kernels::cuda

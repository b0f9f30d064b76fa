#pragma once
#include "core/tensor.h"
#include "kernels/cuda/multiprocessors.h"
#include "kernels/cuda/rows_linear.h"

namespace krait::kernels::cuda {

/// Blocks of the kernel below.
inline constexpr int kHeadBlocks = kMultiprocessors;

/// The head of a decoding step of up to 64 rows: y = scale x w^T of many columns (RowsLinear's x, w, y, scale, of which
/// `normed` is not written). y may be null. Where `likeliest` (rows, kHeadBlocks) is given, the largest likeliest_key of a
/// block's columns below `choices`.
struct RowsHead {
  const bf16 *x, *w;
  bf16* y;
  int64_t x_row, y_row;
  int rows, n, k;
  RowScale scale;
  uint64_t* likeliest;
  int choices;
};

/// Whether sizes and addresses suit the kernel.
bool rows_head_fits(const RowsLinear& map, Device device);
RowsHead rows_head_of(const RowsLinear& map);
/// Weights are read before the kernel in front has finished. When the next kernel begins, all in front of this one have.
void rows_head(const RowsHead& a, Stream stream);


}  // namespace krait::kernels::cuda

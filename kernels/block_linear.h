#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// The largest sides of the blocks of a block-diagonal matrix that these functions take; larger blocks are products.
inline constexpr int64_t kMaxBlockSide = 16;

/// y[.., n, o] = sum_i w[n, o, i] x[.., n, i], all blocks n of a position side by side: the headwise maps of xLSTM
/// (Beck et al. 2024, figure 11).
/// x (..., blocks in), w (blocks, out, in) with in, out <= kMaxBlockSide, y (..., blocks out); fp32, fp64 or bf16.
Tensor block_linear_forward(const Tensor& x, const Tensor& w);

struct BlockLinearGrad {
  Tensor dx, dw;  // dw is dw_sum when that is defined, which is added to
};
BlockLinearGrad block_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& w, bool want_dx, bool want_dw,
                                      const Tensor& dw_sum = {});

/// x (r, blocks in): rows may lie apart, their elements do not; y, dx contiguous; dy as x. dw (blocks, out, in) in the
/// accumulation dtype, summed over fixed chunks of rows in a fixed order; dx or dw may be undefined.
KRAIT_BACKENDS(void block_linear_forward(Tensor& y, const Tensor& x, const Tensor& w);
               void block_linear_backward(Tensor& dx, Tensor& dw, bool add_dw, const Tensor& dy, const Tensor& x,
                                          const Tensor& w))

}  // namespace kernels
}  // namespace krait

#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// Causal depthwise convolution along the sequence, one filter of width k per channel (Gu & Dao 2023, section 3.4;
/// oldest tap first):
///   p[t,c] = bias[c] + sum_j weight[c,j] x[t-k+1+j, c]        y = p, or silu(p)
/// Inputs before t = 0 are the k - 1 of `initial` (oldest first), or 0. The final state is the last k - 1 inputs.
/// With segments a tap that leaves t's document counts as 0; `initial` belongs to the document of t = 0, and the final
/// state keeps the inputs of the last document, 0 elsewhere.
/// Backward, with g = dy silu'(p) (p is computed again) and d of the final state added to the inputs it holds:
///   dx[s,c] = sum_j weight[c,j] g[s+k-1-j, c]   dweight[c,j] = sum_t g[t,c] x[t-k+1+j, c]   dbias = sum_t g
struct CausalConv1dOut { Tensor y, final_state; };
struct CausalConv1dGrad { Tensor dx, dweight, dbias, dinitial; };

/// x (b, l, c): fp32, bf16 or fp64; rows may be apart (a slice of a wider projection), which costs nothing.
/// weight (c, k), bias (c) or undefined: x's dtype or that of sums (fp32; fp64 for fp64). initial (b, k-1, c) or
/// undefined, like x. segments (b, l) int32, ascending in a row, or undefined. y (b, l, c) and final_state (b, k-1, c)
/// like x, contiguous; sums in fp32 (fp64 for fp64). k up to 8 is fast on CUDA, any k works.
CausalConv1dOut causal_conv1d_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& initial,
                                      bool silu, const Tensor& segments = {});

/// dy or dfinal may be undefined (0). dweight and dbias are summed in a fixed order, and added to the *_into gradient
/// buffers where those are given (then returned undefined). dinitial is undefined without `initial`. dx is written to
/// dx_into (like x; its rows may be apart) where that is given.
CausalConv1dGrad causal_conv1d_backward(const Tensor& dy, const Tensor& dfinal, const Tensor& x, const Tensor& weight,
                                        const Tensor& bias, const Tensor& initial, bool silu,
                                        const Tensor& segments = {}, const Tensor& dweight_into = {},
                                        const Tensor& dbias_into = {}, const Tensor& dx_into = {});

/// One position: x (b, c) to y (b, c); state (b, k-1, c) advances in place.
Tensor causal_conv1d_step(Tensor& state, const Tensor& x, const Tensor& weight, const Tensor& bias, bool silu);

/// What both directions read. x and dy have contiguous rows, weight and bias are in the dtype of sums, the rest is
/// contiguous; bias, initial, segments may be undefined.
struct CausalConv1dInputs {
  Tensor x, weight, bias, initial, segments;
  bool silu = false;
};

// The backends. The rows of dx may be apart. dweight (c, k) and dbias (c, undefined without a bias) = or += the sums; dfinal and dinitial may be
// undefined. Where l < k - 1 the final state holds part of `initial`.
KRAIT_BACKENDS(void causal_conv1d_forward(Tensor& y, Tensor& final_state, const CausalConv1dInputs& in);
               void causal_conv1d_backward(Tensor& dx, Tensor& dinitial, Tensor& dweight, bool add_dweight,
                                           Tensor& dbias, bool add_dbias, const Tensor& dy, const Tensor& dfinal,
                                           const CausalConv1dInputs& in))

}  // namespace kernels
}  // namespace krait

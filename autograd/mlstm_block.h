#pragma once
#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

/// Where the gradient of [x_m; z] (.., 2 e) is made: who has the whole gradient of a half writes it into its place, and
/// hands that on.
class HalvesGradient {
 public:
  explicit HalvesGradient(const Tensor& up) : shape_(up.shape()), dtype_(up.dtype()), device_(up.device()) {}
  /// Half i of a buffer that is made when it is first asked for.
  Tensor half(int64_t i);
  /// The buffer, when a and z are its halves; undefined else. Forgets it.
  Tensor take(const Tensor& a, const Tensor& z);

 private:
  Shape shape_;
  DType dtype_;
  Device device_;
  Tensor whole_;
};

/// The halves of [x_m; z] (.., 2 e), x_m for two readers: their gradients are joined in one pass, or nothing is left to do
/// where `gradient` holds them.
struct MlstmHalves {
  Variable x_m, x_m_again, z;
  std::shared_ptr<HalvesGradient> gradient;
};
MlstmHalves mlstm_halves(const Variable& up);

/// q = Wq x_c, k = Wk x_c, v = Wv x_m with block-diagonal maps (blocks, side, side), and gates = G [q; k; v] (n, 3 e), in
/// the dtype of sums; see kernels/mlstm_block.h. x_c and x_m (.., e). `x_c` of the result is x_c again: what reads it
/// there has its gradient added in the same pass.
struct MlstmMapped { Variable q, k, v, gates, x_c; };
MlstmMapped mlstm_maps(const Variable& x_c, const Variable& x_m, const Variable& w_q, const Variable& w_k,
                       const Variable& w_v, const Variable& gates);

/// The maps of x_c = silu(conv(x_m)) (autograd/causal_conv1d.h) and x_m = up.x_m_again, in one function: the gradient of x_m
/// is made in its place.
struct MlstmConvolved { MlstmMapped maps; Variable final_state; };
MlstmConvolved mlstm_conv_maps(const MlstmHalves& up, const Variable& conv_weight, const Variable& conv_bias,
                               const Variable& initial_state, const Tensor& segments, const Variable& w_q,
                               const Variable& w_k, const Variable& w_v, const Variable& gates);

/// (head_norm(h) w + skip x_c) silu(z): h (.., heads, p) in the dtype of sums, w and skip (heads p), x_c and z
/// (.., heads p).
Variable mlstm_output(const Variable& h, const Variable& w, const Variable& skip, const Variable& x_c, const Variable& z,
                      double eps);

}  // namespace autograd
}  // namespace krait

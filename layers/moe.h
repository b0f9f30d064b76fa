#pragma once
#include "autograd/moe.h"
#include "layers/mlp.h"

namespace krait::layers {

/// Mixture of SwiGLU experts (Shazeer et al. 2017; Fedus et al. 2022; null experts: Zeng et al. 2024):
///   p = softmax(W_r x) over the experts and null experts, in fp32        S = the top_k of p, real ones only
///   y = sum_{e in S} w_e W_down^e (silu(W_gate^e x) * W_up^e x),  w = p, or p / sum_S p with renormalize
/// With a tensor group each member has a share of the experts. The tokens are on every member already, so nothing is sent
/// to experts: each computes what its own make of all tokens, and the results are summed. Volume per rank, forward: an
/// all-reduce of t m numbers, as behind any MLP; backward: the same of dx and of t k router weights.
/// No token is dropped. In training the gradients of balance_coef balance + z_coef router_z (kernels/moe.h) are added
/// to the logits', as means over the positions of the batch that are not padding; loss_sum does not contain them.
class Moe final : public FeedForward {
 public:
  Moe(const MlpConfig& config, const LayerContext& context);
  Variable forward(const Variable& x) override { return forward_padded(x, {}); }
  Variable forward_padded(const Variable& x, const Tensor& lengths) override;
  double extra_flops_per_token() const override;
  void set_auxiliary_scale(double scale) override { auxiliary_scale_ = scale; }
  Tensor auxiliary_loss() const override { return auxiliary_loss_; }

  /// The router's decisions on x (t, d), and its auxiliary losses.
  MoeRoute route(const Variable& x) const { return moe_route(logits(x), options_); }
  MoeLosses losses(const Variable& x) const;

 private:
  Variable logits(const Variable& x) const;
  comm::GroupPtr tensor_, sequence_;  // share the experts, and each sequence: its members route parts of one batch
  Owned own_;  // experts
  MoeConfig config_;
  MoeOptions options_;
  double auxiliary_scale_ = 1;
  Tensor auxiliary_loss_;
  Parameter router_, gate_up_, down_;
};

}  // namespace krait::layers

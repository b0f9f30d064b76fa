#pragma once
#include "autograd/linear_attention.h"
#include "layers/linear.h"
#include "layers/linear_attention_config.h"
#include "layers/registry.h"

namespace krait::layers {

/// Linear attention (Katharopoulos et al. 2020): per head, with phi = elu + 1,
///   [q, k, v] = W_qkv u        S_t = e^{g_t} S_{t-1} + v_t (x) phi(k_t)        z_t = e^{g_t} z_{t-1} + phi(k_t)
///   y_t = S_t phi(q_t) / (z_t . phi(q_t) + eps)        out = W_o y
/// feature identity: phi = 1, q scaled by head_dim^-1/2, no divisor. Without gate g = 0; with it, as in gated linear
/// attention (Yang et al. 2024) with one decay per head,
///   g_t = log sigmoid(W_g u + b_g)
/// With a tensor group each member has a share of the heads.
/// b_g starts at 3 to 6 over the heads: memories of 20 to 400 positions. The state is S, with z as its last row.
class LinearAttention final : public Mixer {
 public:
  LinearAttention(const LinearAttentionConfig& config, const LayerContext& context);

  Variable forward(const Variable& u, const SequenceInfo& info, LayerState* state) override;
  Tensor step(const Tensor& u, LayerState& state) override;
  LayerState initial_state(int64_t batch, int64_t max_length, DType dtype, Device device) const override;
  double extra_flops_per_token(int64_t context) const override;
  std::string kernel_name(int64_t batch, int64_t context, DType dtype, Device device,
                          bool has_segments) const override;

 private:
  struct Projected { Variable q, k, v, g; };  // (b, l, h, head_dim), g (b, l, h) or undefined
  Variable qkv(const Variable& u) const;
  Projected project(const Variable& u, const Variable& qkv) const;
  LinearAttentionOptions options(const Tensor& segments) const;

  LinearAttentionConfig config_;  // n_heads: the heads here
  comm::GroupPtr sequence_, tensor_;  // share each sequence, and the heads
  Parameter qkv_weight_, qkv_bias_, gate_weight_, gate_bias_;
  std::shared_ptr<Linear> out_;
};

/// The layer kind `linear_attention`.
LayerKind linear_attention_kind();

}  // namespace krait::layers

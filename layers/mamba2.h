#pragma once
#include "autograd/state_passing.h"
#include "kernels/mamba2_step.h"
#include "layers/layer_context.h"
#include "layers/mamba2_config.h"
#include "layers/mixer.h"
#include "layers/registry.h"
#include "layers/tensor_split.h"

namespace krait::layers {

/// Mamba-2 (Dao & Gu 2024, section 7): with heads h of p channels, a state of p x n each, and g groups of heads that
/// share B and C,
///   [z, xBC, dt] = u W_in^T            [x, B, C] = silu(conv(xBC))
///   dt' = softplus(dt + dt_bias)       A = -e^{A_log}
///   h_t = e^{dt'_t A} h_{t-1} + dt'_t x_t (x) B_t           y_t = h_t C_t + D x_t
///   out = GatedRMSNorm(y, z) W_out^T
/// With a tensor group each member has a share of the heads, and their groups' B and C; where there are fewer groups than
/// members, several hold copies of one, and exchange the norm's mean square.
/// The state is the last d_conv - 1 inputs of the convolution and h.
class Mamba2 final : public Mixer {
 public:
  Mamba2(const Mamba2Config& config, const LayerContext& context);

  /// The layer with its states as variables, for gradients through them; conv (b, d_conv - 1, inner + 2 g n) and ssm
  /// (b, heads, p, n) may be undefined. Without keep_state ssm comes out undefined.
  struct Out { Variable y, conv, ssm; };
  Out apply(const Variable& u, const Variable& conv, const Variable& ssm, const Tensor& segments,
            bool keep_state = true) const;

  Variable forward(const Variable& u, const SequenceInfo& info, LayerState* state) override;
  Tensor step(const Tensor& u, LayerState& state) override;
  LayerState initial_state(int64_t batch, int64_t max_length, DType dtype, Device device) const override;
  bool keep_recent_positions(LayerState& state, DType dtype) const override;
  double extra_flops_per_token(int64_t context) const override;
  std::string kernel_name(int64_t batch, int64_t context, DType dtype, Device device,
                          bool has_segments) const override;

 private:
  kernels::Mamba2StepWeights step_weights() const;
  int64_t conv_width() const { return config_.inner + 2 * config_.n_groups * config_.d_state; }
  /// Whether several members hold the B and C of a group.
  bool copied() const { return tensor_->size() > whole_.n_groups; }
  void share(Variable& in_weight, Variable& in_bias, Variable& conv_weight, Variable& conv_bias) const;

  Mamba2Config whole_, config_;  // config_: inner, heads and n_groups of this member
  comm::GroupPtr sequence_, tensor_;  // share each sequence, and the heads
  Owned groups_;
  double eps_, dt_low_, dt_high_;
  Parameter in_weight_, in_bias_, conv_weight_, conv_bias_, dt_bias_, A_log_, D_, norm_weight_, out_weight_, out_bias_;
};

/// The layer kind `mamba2`.
LayerKind mamba2_kind();

}  // namespace krait::layers

#pragma once
#include "layers/gated_cnn_config.h"
#include "layers/linear.h"
#include "layers/registry.h"

namespace krait::layers {

/// Gated convolutional block (Dauphin et al. 2017, as in MambaOut: Yu & Wang 2024), here causal: Mamba without its
/// state space. With u the normalised input, F inner and C convolved channels,
///   [g, i, c] = W_1 u + b_1, of widths F, F - C, C          c' = conv(c), depthwise, causal
///   out = W_2 (gelu(g) * [i, c']) + b_2
/// With a tensor group each member has a share of the channels of i and of c, and of those of g that gate them.
/// The state is the last d_conv - 1 rows of c. The paper's norm is model.norm: layer with norm_eps 1e-6.
class GatedCnn final : public Mixer {
 public:
  GatedCnn(const GatedCnnConfig& config, const LayerContext& context);

  Variable forward(const Variable& u, const SequenceInfo& info, LayerState* state) override;
  Tensor step(const Tensor& u, LayerState& state) override;
  LayerState initial_state(int64_t batch, int64_t max_length, DType dtype, Device device) const override;
  std::string prefix() const override { return ""; }
  double extra_flops_per_token(int64_t context) const override;
  std::string kernel_name(int64_t batch, int64_t context, DType dtype, Device device,
                          bool has_segments) const override;

 private:
  struct Projected { Variable gate, plain, mixed; };  // plain undefined when every channel is convolved
  Projected project(const Variable& u) const;
  Variable finish(const Projected& in, const Variable& convolved) const;

  GatedCnnConfig config_;  // hidden and conv_channels: those here
  comm::GroupPtr tensor_, sequence_;
  std::shared_ptr<Linear> fc1_, fc2_;
  Parameter conv_weight_, conv_bias_;
};

/// The layer kind `gated_cnn`.
LayerKind gated_cnn_kind();

}  // namespace krait::layers

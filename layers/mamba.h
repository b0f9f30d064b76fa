#pragma once
#include "layers/layer_context.h"
#include "layers/mamba_config.h"
#include "layers/mixer.h"
#include "layers/registry.h"

namespace krait::layers {

/// Mamba (Gu & Dao 2023): a state-space model whose time step, B and C depend on the input. With e = expand d_model
/// channels of n states:
///   [x; z] = in_proj(u)              x~ = silu(conv1d(x)), causal, one filter per channel
///   [d; B; C] = x_proj(x~)           delta = softplus(dt_proj(d))          A = -exp(A_log)
///   h_t = exp(delta_t A) h_{t-1} + delta_t B_t x~_t                        y_t = C_t h_t + D x~_t
///   out = out_proj(y silu(z))
/// With a tensor group each member has a share of the e channels; only x_proj looks across them: its products are summed,
/// as out_proj's are.
/// Time steps, A, D and h are fp32 also in bf16. The state is the last d_conv - 1 inputs of the convolution ("conv",
/// (b, d_conv - 1, e)) and h ("ssm", (b, e, n)).
class Mamba final : public Mixer {
 public:
  Mamba(const MambaConfig& config, const LayerContext& context);

  struct Result { Variable y, conv, ssm; };
  /// The parallel form with its states, differentiable in all of them; conv and ssm may be undefined (0).
  Result run(const Variable& u, const Tensor& segments, const Variable& conv, const Variable& ssm) const {
    return run(u, segments, conv, ssm, sequence_);
  }

  Variable forward(const Variable& x, const SequenceInfo& info, LayerState* state) override;
  Tensor step(const Tensor& x, LayerState& state) override;
  LayerState initial_state(int64_t batch, int64_t max_length, DType dtype, Device device) const override;
  double extra_flops_per_token(int64_t context) const override;
  std::string kernel_name(int64_t batch, int64_t context, DType dtype, Device device,
                          bool has_segments) const override;

 private:
  Result run(const Variable& u, const Tensor& segments, const Variable& conv, const Variable& ssm,
             const comm::GroupPtr& sequence) const;
  /// From and into a state.
  Variable advance(const Variable& x, const Tensor& segments, LayerState& state, const comm::GroupPtr& sequence) const;

  MambaConfig config_;  // d_inner: the channels here
  comm::GroupPtr sequence_, tensor_;  // share each sequence, and the channels
  Parameter in_proj_, in_bias_, conv_, conv_bias_, x_proj_, dt_proj_, dt_bias_, A_log_, D_, out_proj_, out_bias_;
};

/// The layer kind `mamba`.
LayerKind mamba_kind();

}  // namespace krait::layers

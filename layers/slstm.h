#pragma once
#include "autograd/recurrent.h"
#include "autograd/slstm.h"
#include "layers/layer_context.h"
#include "layers/mixer.h"
#include "layers/registry.h"
#include "layers/slstm_config.h"
#include "layers/tensor_split.h"

namespace krait::layers {

/// Exponent and bounds of the sLSTM forget bias: unit j of p gets 5 - 12 (j / (p - 1))^(0.3 + 1.3 depth), from long to
/// short memory; depth is the block's place from 0 to 1. One unit: 5.
double slstm_forget_bias(int64_t unit, int64_t units, int64_t block, int64_t blocks);

/// sLSTM (Beck et al. 2024, section 2.2 and appendix A), the post-up-projection block's mixer: on x of h heads of p
/// channels,
///   u = SiLU(conv(x))        [i; f] = [W_i; W_f] u        [z; o] = [W_z; W_o] x          (each within its head)
///   y = cell([i, f, z, o] + R y_{t-1} + b)                                               (SlstmCell)
///   out = head norm(y) (1 + w)
/// The block's second branch, W_down (gelu(g) * v), [g; v] = W_up norm(x), is its own feed-forward.
/// With a tensor group each member has a share of the heads, to which their channels of x suffice; the outputs are gathered.
/// State: y, c, n, m in fp32 and the convolution's last inputs.
class Slstm final : public Mixer {
 public:
  Slstm(const SlstmConfig& config, const LayerContext& context);

  Variable forward(const Variable& x, const SequenceInfo& info, LayerState* state) override;
  Tensor step(const Tensor& x, LayerState& state) override;
  LayerState initial_state(int64_t batch, int64_t max_length, DType dtype, Device device) const override;
  std::shared_ptr<FeedForward> own_feed_forward(const LayerContext& context) const override;
  std::string norm_name() const override { return "norm"; }
  std::string prefix() const override { return ""; }
  double extra_flops_per_token(int64_t context) const override;
  std::string kernel_name(int64_t batch, int64_t context, DType dtype, Device device,
                          bool has_segments) const override;

 private:
  /// The parameters of some heads.
  struct Weights {
    Variable conv_weight, conv_bias, w_i, w_f, w_z, w_o, R, b, norm;
  };
  Weights weights() const;
  Weights weights(int64_t first_head, int64_t end_head) const;
  RecurrentOut cell(const Variable& u, const Variable& x, const Weights& w, const Tensor& segments,
                    const Variable& state) const;
  SlstmForget forget_gate() const { return config_.forget_gate == "exp" ? SlstmForget::exp : SlstmForget::sigmoid; }
  Variable own_heads(const Variable& x, const SequenceInfo& info, LayerState* state);
  /// State of the recurrence (4, b, h, p) and the convolution's last inputs (b, conv - 1, c), undefined where none is
  /// carried. Alike on all members of the sequence group.
  struct Carried { Tensor cell, conv; };
  Variable over_ranks(const Variable& x, const SequenceInfo& info, Carried& carried) const;

  SlstmConfig config_;  // n_heads: the heads here
  comm::GroupPtr sequence_, tensor_;
  int64_t d_model_;  // the channels here
  double norm_eps_;
  Parameter conv_weight_, conv_bias_, w_i_, w_f_, w_z_, w_o_, R_, b_, norm_weight_;
};

/// The layer kind `slstm`.
LayerKind slstm_kind();

}  // namespace krait::layers

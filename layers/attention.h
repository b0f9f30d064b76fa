#pragma once
#include "kernels/attention.h"
#include "kernels/rope.h"
#include "layers/attention_config.h"
#include "layers/layer_context.h"
#include "layers/linear.h"
#include "layers/mixer.h"
#include "layers/norm.h"
#include "layers/registry.h"

namespace krait::layers {

/// Causal self-attention (Vaswani et al. 2017), with rotary positions (Su et al. 2021), grouped keys and values
/// (Ainslie et al. 2023), a sliding window and ALiBi (Press et al. 2022):
///   [q; k; v] = x W_qkv^T      o = dropout(softmax(scale q k^T + mask)) v      y = o W_o^T
/// With a tensor group each member has a share of the heads; where there are fewer key heads than members, several hold
/// copies of one.
/// The state is the cache of keys (after rotation) and values: all max_length positions, or with a window the
/// last window - 1; on CUDA, where one kernel serves a step, also the position (b) of the next step.
class Attention final : public Mixer {
 public:
  Attention(const AttentionConfig& config, const LayerContext& context);

  Variable forward(const Variable& x, const SequenceInfo& info, LayerState* state) override;
  Tensor step(const Tensor& x, LayerState& state) override;
  LayerState initial_state(int64_t batch, int64_t max_length, DType dtype, Device device) const override;
  std::string norm_name() const override { return "attn_norm"; }
  std::string prefix() const override { return ""; }
  bool carries_state() const override { return false; }  // the cache grows with the text
  double extra_flops_per_token(int64_t context) const override;
  std::string kernel_name(int64_t batch, int64_t context, DType dtype, Device device,
                          bool has_segments) const override;

 private:
  int64_t heads() const { return q_.count() + 2 * kv_.count(); }  // here
  std::pair<Variable, Variable> projection() const;
  Variable qkv(const Variable& x) const;
  void make_rope_table(int64_t needed, const Tensor& x);
  Variable project(const Variable& x, const Tensor& positions, int64_t before);
  Tensor with_cache(const Tensor& all, const SequenceInfo& info, LayerState& state);
  kernels::AttentionOptions options(Device device) const;

  AttentionConfig config_;
  comm::GroupPtr group_;
  Owned q_, kv_;  // heads
  comm::GroupPtr sequence_;
  std::string stream_;  // of the random numbers of dropout
  Parameter qkv_weight_, qkv_bias_;
  std::shared_ptr<Norm> q_norm_, k_norm_;
  std::shared_ptr<Linear> out_;
  mutable Tensor cos_, sin_, slopes_;  // tables, made on first use on the device of the input
};

/// The layer kind `attention`.
LayerKind attention_kind();

}  // namespace krait::layers

#pragma once
#include "autograd/mlstm.h"
#include "kernels/mlstm_step.h"
#include "layers/layer_context.h"
#include "layers/linear.h"
#include "layers/mixer.h"
#include "layers/mlstm_config.h"
#include "layers/registry.h"

namespace krait::layers {

/// What both blocks of mLSTM share: the heads of this member of a tensor group, the cell with its state {c, n, m}, fp32 (fp64 in fp64).
class MlstmMixer : public Mixer {
 public:
  Variable forward(const Variable& x, const SequenceInfo& info, LayerState* state) final;
  Tensor step(const Tensor& x, LayerState& state) final;
  LayerState initial_state(int64_t batch, int64_t max_length, DType dtype, Device device) const override;
  double extra_flops_per_token(int64_t context) const override;
  std::string kernel_name(int64_t batch, int64_t context, DType dtype, Device device, bool has_segments) const final;

 protected:
  /// `key`: the option that says how many heads there are.
  MlstmMixer(int64_t heads, const char* key, int64_t dq, int64_t dv, const MlstmOptions& options,
             const LayerContext& context)
      : tensor_(context.parallel.tensor), sequence_(context.parallel.sequence), own_(owned(tensor_, heads, key, "heads")),
        heads_(own_.count()), dq_(dq), dv_(dv), options_(options) {}
  /// x (b, l, d) to the same; `recurrent`: a single position that advances the state.
  virtual Variable mix(const Variable& x, const SequenceInfo& info, LayerState* state, bool recurrent) = 0;
  /// q, k (b, l, h dq), v (b, l, h dv), gates (b, l, 2 h) = [i, f] to the heads' outputs (b, l, h, dv), or to what
  /// `output`, which single steps do not have, makes of them.
  Variable cell(const Variable& q, const Variable& k, const Variable& v, const Variable& gates,
                const SequenceInfo& info, LayerState* state, bool recurrent, const MlstmHeadOutput& output = {}) const;
  comm::GroupPtr tensor_, sequence_;  // share the heads, and each sequence
  Owned own_;                         // heads
  int64_t heads_, dq_, dv_;
  MlstmOptions options_;
};

/// mLSTM block of the first generation (Beck et al. 2024, figure 11), behind the block's norm; E inner channels:
///   [x_m; z] = W_up u                   x_c = SiLU(conv(x_m))
///   q, k, v = block-diagonal maps of x_c, x_c, x_m          i, f = W_if [q; k; v] + b
///   h = LayerNorm of each head of mlstm(q, k, v, i, f)      y = W_down ((h + skip * x_c) * SiLU(z))
class Mlstm final : public MlstmMixer {
 public:
  Mlstm(const MlstmConfig& config, const LayerContext& context);
  LayerState initial_state(int64_t batch, int64_t max_length, DType dtype, Device device) const override;
  bool keep_recent_positions(LayerState& state, DType dtype) const override;
  std::string prefix() const override { return ""; }

 private:
  Variable mix(const Variable& x, const SequenceInfo& info, LayerState* state, bool recurrent) override;
  Variable advance(const Variable& x, LayerState& state);
  kernels::MlstmStepMapsWeights maps_weights() const;
  MlstmConfig config_;  // inner: the channels here
  std::shared_ptr<Linear> up_, down_;
  Parameter conv_weight_, conv_bias_, q_, k_, v_, gate_weight_, gate_bias_, norm_, skip_;
};

/// mLSTM of xLSTM 7B (Beck et al. 2025), behind the block's norm; cap(x) = c tanh(x / c):
///   q, k, v = W u      i, f = cap(W u + b)      h = LayerNorm of each head of mlstm(q, k, v, i, f)
///   y = W_out (sigmoid(W_o u) * h)
/// Its SwiGLU is the model's mlp.
class MlstmLarge final : public MlstmMixer {
 public:
  MlstmLarge(const MlstmLargeConfig& config, const LayerContext& context);
  std::string norm_name() const override { return "norm_mlstm"; }
  std::string prefix() const override { return "mlstm_layer"; }

 private:
  Variable mix(const Variable& x, const SequenceInfo& info, LayerState* state, bool recurrent) override;
  MlstmLargeConfig config_;  // qk_width: the channels here
  Parameter qkvo_, gate_weight_, gate_bias_, norm_;
  std::shared_ptr<Linear> out_;
};

/// The layer kinds `mlstm` and `mlstm_large`.
LayerKind mlstm_kind();
LayerKind mlstm_large_kind();

}  // namespace krait::layers

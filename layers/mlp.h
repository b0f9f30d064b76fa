#pragma once
#include <string>

#include "layers/layer_context.h"
#include "layers/linear.h"
#include "layers/mlp_config.h"

namespace krait::layers {

/// What mixes channels at each position: x (b, l, d) to the same shape.
class FeedForward : public Module {
 public:
  virtual Variable forward(const Variable& x) = 0;
  /// The same of rows of which only some positions count (SequenceInfo::lengths, may be undefined): in losses of its own the
  /// layer leaves out the others.
  virtual Variable forward_padded(const Variable& x, const Tensor& /*lengths*/) { return forward(x); }
  /// FLOPs per token of a forward pass beyond two per matrix parameter; negative where a token skips some.
  virtual double extra_flops_per_token() const { return 0; }
  /// Factor of losses that the layer adds to the gradient itself: 1 / the micro-batches whose gradients are summed.
  virtual void set_auxiliary_scale(double /*scale*/) {}
  /// These losses of the last forward in training, with that factor, a scalar; of a sequence that ranks share this rank's
  /// share. Undefined where there are none.
  virtual Tensor auxiliary_loss() const { return {}; }
};

// With a tensor group the hidden units are split: up-projections by rows, the down-projection by columns, one sum of the
// outputs (Shoeybi et al. 2019).

/// y = W_proj act(W_fc x + b) + b. GELU in the erf form (Hendrycks & Gimpel 2016) or its tanh form, which the
/// matrix product applies itself; squared ReLU (So et al. 2021); SiLU.
class Mlp final : public FeedForward {
 public:
  Mlp(const MlpConfig& config, const LayerContext& context);
  Variable forward(const Variable& x) override;

 private:
  std::string type_;
  std::shared_ptr<Linear> fc_, proj_;
};

/// y = W_down (SiLU(W_gate x) * W_up x) (Shazeer 2020). Gate and up are one matrix product.
class SwiGlu final : public FeedForward {
 public:
  SwiGlu(const MlpConfig& config, const LayerContext& context);
  Variable forward(const Variable& x) override;

 private:
  comm::GroupPtr group_;
  Parameter gate_up_, bias_;
  std::shared_ptr<Linear> down_;
};

/// y = W_down (gelu(g) * u), [g; u] = W_up x (GeGLU, Shazeer 2020, with the erf form). One matrix, named as in xLSTM.
class GeluGated final : public FeedForward {
 public:
  GeluGated(const MlpConfig& config, const LayerContext& context);
  Variable forward(const Variable& x) override;

 private:
  std::shared_ptr<Linear> up_, down_;
};

/// The layer that the config names; null for `none`.
std::shared_ptr<FeedForward> make_mlp(const MlpConfig& config, const LayerContext& context);

}  // namespace krait::layers

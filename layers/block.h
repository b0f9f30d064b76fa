#pragma once
#include "layers/layer_context.h"
#include "layers/mixer.h"
#include "layers/mlp.h"
#include "layers/norm.h"

namespace krait::layers {

/// The residual stream between blocks. `pending` is what the last branch computed and nobody has added yet: the
/// next norm adds it in the same pass. Undefined before the first branch.
struct ResidualStream {
  Variable residual, pending;
};

/// Residual block. Pre-norm: r += mixer(norm(r)); r += mlp(norm(r)). Post-norm: r = norm(r + mixer(r)) and so on.
/// The second branch only where there is an mlp, the model's or the mixer's own.
class Block final : public Module {
 public:
  Block(std::shared_ptr<Mixer> mixer, std::shared_ptr<FeedForward> mlp, const NormConfig& norm,
        const LayerContext& context);
  /// With a state, a single position takes the mixer's step form.
  ResidualStream forward(const ResidualStream& in, const SequenceInfo& info, LayerState* state);
  Mixer& mixer() const { return *mixer_; }
  FeedForward* mlp() const { return mlp_.get(); }  // null: none

 private:
  template <class Branch>
  void add_branch(ResidualStream& stream, const Norm& norm, const char* name, Branch branch) const;
  LayerContext context_;
  std::shared_ptr<Norm> mixer_norm_, mlp_norm_;
  std::shared_ptr<Mixer> mixer_;
  std::shared_ptr<FeedForward> mlp_;
};

/// Adds what is pending and normalises. Returns the norm; the stream then holds the sum and nothing pending.
Variable add_and_norm(ResidualStream& stream, const Norm& norm);

}  // namespace krait::layers

#include "layers/block.h"

#include "autograd/dropout.h"

namespace krait::layers {

Block::Block(std::shared_ptr<Mixer> mixer, std::shared_ptr<FeedForward> mlp, const NormConfig& norm,
             const LayerContext& context)
    : context_(context), mixer_(std::move(mixer)), mlp_(std::move(mlp)) {
  mixer_norm_ = child<Norm>(mixer_->norm_name(), context.d_model, norm);
  add_child(mixer_->prefix(), mixer_);
  if (!mlp_) return;
  mlp_norm_ = child<Norm>("mlp_norm", context.d_model, norm);
  add_child("", mlp_);
}

Variable add_and_norm(ResidualStream& stream, const Norm& norm) {
  if (!stream.pending.defined()) return norm.forward(stream.residual);
  AddNorm both = norm.forward_add(stream.pending, stream.residual);
  stream = {both.residual, {}};
  return both.y;
}

ResidualStream Block::forward(const ResidualStream& in, const SequenceInfo& info, LayerState* state) {
  const double p = training() ? context_.dropout : 0.0;
  ResidualStream stream = in;
  const Variable mixer_in = add_and_norm(stream, *mixer_norm_);
  const bool one_step = state && mixer_in.size(1) == 1 && !info.segments.defined();
  const Variable mixed =
      one_step ? Variable(mixer_->step(mixer_in.data(), *state)) : mixer_->forward(mixer_in, info, state);
  stream.pending = dropout(mixed, p, context_.stream("mixer"));
  if (!mlp_) return stream;
  const Variable mlp_in = add_and_norm(stream, *mlp_norm_);
  stream.pending = dropout(mlp_->forward(mlp_in), p, context_.stream("mlp"));
  return stream;
}

}  // namespace krait::layers

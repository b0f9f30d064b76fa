#include "layers/block.h"

#include "autograd/dropout.h"

namespace krait::layers {

Block::Block(std::shared_ptr<Mixer> mixer, std::shared_ptr<FeedForward> mlp, const NormConfig& norm,
             const LayerContext& context)
    : context_(context), mixer_(std::move(mixer)), mlp_(std::move(mlp)) {
  mixer_norm_ = child<Norm>(mixer_->norm_name(), context.d_model, norm);
  add_child(mixer_->prefix(), mixer_);
  const bool own = !mlp_;
  if (own) mlp_ = mixer_->own_feed_forward(context);
  if (!mlp_) return;
  mlp_norm_ = child<Norm>(own ? "ffn_norm" : "mlp_norm", context.d_model, norm);
  add_child("", mlp_);
}

Variable add_and_norm(ResidualStream& stream, const Norm& norm) {
  if (!stream.pending.defined()) return norm.forward(stream.residual);
  AddNorm both = norm.forward_add(stream.pending, stream.residual);
  stream = {both.residual, {}};
  return both.y;
}

template <class Branch>
void Block::add_branch(ResidualStream& stream, const Norm& norm, const char* name, Branch branch) const {
  const double p = training() ? context_.dropout : 0.0;
  const Variable in = context_.post_norm ? stream.residual : add_and_norm(stream, norm);
  const Variable y = branch(in);
  stream.pending = dropout(y, p, context_.stream(name), DropoutPart::of(y, *context_.parallel.sequence));
  if (context_.post_norm) stream = {add_and_norm(stream, norm), {}};
}

ResidualStream Block::forward(const ResidualStream& in, const SequenceInfo& info, LayerState* state) {
  ResidualStream stream = in;
  add_branch(stream, *mixer_norm_, "mixer", [&](const Variable& x) {
    const bool one_step = state && x.size(1) == 1 && !info.segments.defined() && context_.parallel.sequence->size() == 1;
    return one_step ? Variable(mixer_->step(x.data(), *state)) : mixer_->forward(x, info, state);
  });
  if (mlp_) add_branch(stream, *mlp_norm_, "mlp", [&](const Variable& x) { return mlp_->forward_padded(x, info.lengths); });
  return stream;
}

}  // namespace krait::layers

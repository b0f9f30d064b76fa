#include "layers/decoder.h"

#include <set>

#include "kernels/elementwise.h"
#include "layers/registry.h"

namespace krait::layers {

Decoder::Decoder(const ModelConfig& config, int64_t context_length, const Parallel& parallel) : sequence_(parallel.sequence) {
  LayerContext context;
  context.d_model = config.d_model;
  context.n_layers = config.n_layers;
  context.n_branches = config.n_layers * (config.mlp.type == "none" ? 1 : 2);
  context.context = context_length;
  context.init_std = config.init_std;
  context.residual_std = config.residual_std();
  context.norm_eps = config.norm_eps;
  context.post_norm = config.norm_position == "post";
  context.dropout = config.dropout;
  context.parallel = parallel;
  const NormConfig norm{config.norm, config.norm_eps};
  for (int64_t i = 0; i < config.n_layers; ++i) {
    context.layer_index = i;
    const std::string& kind = config.kind_of(i);
    auto mixer = make_mixer(kind, config.options_of(kind), context);
    blocks_.push_back(
        child<Block>(fmt::format("layers.{}", i), std::move(mixer), make_mlp(config.mlp, context), norm, context));
    kinds_.push_back(kind);
  }
  if (!context.post_norm) norm_f_ = child<Norm>("norm_f", config.d_model, norm);
}

Variable Decoder::forward(const Variable& x, const SequenceInfo& info, DecoderState* state) {
  ResidualStream stream{x, {}};
  for (size_t i = 0; i < blocks_.size(); ++i) {
    LayerState* layer_state = state ? &state->layers[i] : nullptr;
    if (!recompute_ || !recording() || state) {
      stream = blocks_[i]->forward(stream, info, layer_state);
      continue;
    }
    Vars in{stream.residual};
    if (stream.pending.defined()) in.push_back(stream.pending);
    const Vars out = recompute(
        [block = blocks_[i], info](const Vars& v) {
          const ResidualStream s = block->forward({v[0], v.size() > 1 ? v[1] : Variable()}, info, nullptr);
          return s.pending.defined() ? Vars{s.residual, s.pending} : Vars{s.residual};
        },
        in);
    stream = {out[0], out.size() > 1 ? out[1] : Variable()};
  }
  if (state) state->length += x.size(1) * sequence_->size();
  return norm_f_ ? add_and_norm(stream, *norm_f_) : stream.residual;
}

DecoderState Decoder::initial_state(int64_t batch, int64_t max_length, DType dtype, Device device) const {
  DecoderState state;
  for (const auto& block : blocks_)
    state.layers.push_back(block->mixer().initial_state(batch, max_length, dtype, device));
  return state;
}

bool Decoder::keep_recent_positions(DecoderState& state, DType dtype) const {
  bool any = false;
  for (size_t i = 0; i < blocks_.size(); ++i) any |= blocks_[i]->mixer().keep_recent_positions(state.layers[i], dtype);
  return any;
}

std::string Decoder::kind_without_stream() const {
  for (size_t i = 0; i < blocks_.size(); ++i)
    if (!blocks_[i]->mixer().carries_state()) return kinds_[i];
  return "";
}

double Decoder::extra_flops_per_token(int64_t context) const {
  double sum = 0;
  for (const auto& block : blocks_) {
    sum += block->mixer().extra_flops_per_token(context);
    if (const FeedForward* mlp = block->mlp()) sum += mlp->extra_flops_per_token();
  }
  return sum;
}

void Decoder::set_auxiliary_scale(double scale) {
  for (const auto& block : blocks_)
    if (FeedForward* mlp = block->mlp()) mlp->set_auxiliary_scale(scale);
}

Tensor Decoder::auxiliary_loss() const {
  Tensor all;
  for (const auto& block : blocks_) {
    const FeedForward* mlp = block->mlp();
    const Tensor own = mlp ? mlp->auxiliary_loss() : Tensor();
    if (own.defined()) all = all.defined() ? kernels::add(all, own) : own;
  }
  return all;
}

std::vector<std::string> Decoder::kernel_lines(int64_t batch, int64_t context, DType dtype, Device device,
                                               bool has_segments) const {
  std::vector<std::string> lines;
  std::set<std::string> seen;
  for (size_t i = 0; i < blocks_.size(); ++i)
    if (seen.insert(kinds_[i]).second)
      lines.push_back(fmt::format(
          "{}: {}", kinds_[i], blocks_[i]->mixer().kernel_name(batch, context, dtype, device, has_segments)));
  return lines;
}

}  // namespace krait::layers

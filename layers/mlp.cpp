#include "layers/mlp.h"

#include "autograd/activation.h"
#include "layers/kan.h"
#include "layers/moe.h"

namespace krait::layers {

namespace {

Owned owned_units(const MlpConfig& config, const LayerContext& context) {
  return owned(context.parallel.tensor, config.hidden, "model.mlp.hidden", "hidden units");
}
// From the residual stream to `matrices` stacked matrices of hidden units, and back.
LinearSplit up_split(const MlpConfig& config, const LayerContext& context, int matrices = 1) {
  LinearSplit split{context.parallel.tensor};
  for (int i = 0; i < matrices; ++i) split.shard.ranges.push_back(owned_units(config, context).range(1, i * config.hidden));
  return split;
}
LinearSplit down_split(const MlpConfig& config, const LayerContext& context) {
  return {context.parallel.tensor, owned_units(config, context).columns()};
}

}  // namespace

Mlp::Mlp(const MlpConfig& config, const LayerContext& context)
    : type_(config.type),
      fc_(child<Linear>("fc", context.d_model, config.hidden, config.bias, context.init_std, up_split(config, context))),
      proj_(child<Linear>("proj", config.hidden, context.d_model, config.bias, context.residual_std,
                          down_split(config, context))) {}

Variable Mlp::forward(const Variable& x) {
  if (type_ == "gelu_tanh") return fc_->forward_through(x, Epilogue::gelu_tanh, *proj_);
  if (type_ == "gelu") return fc_->forward_through(x, Epilogue::gelu_erf, *proj_);
  const Variable h = fc_->forward(x);
  return proj_->forward(type_ == "silu" ? silu(h) : relu2(h));
}

SwiGlu::SwiGlu(const MlpConfig& config, const LayerContext& context) : group_(context.parallel.tensor) {
  const Initializer init = normal(context.init_std), zero = constant(0.0);
  const int64_t f = config.hidden;
  const Shard own = owned_units(config, context).rows();
  gate_up_ = stacked_parameter({{"gate.weight", f, init, own}, {"up.weight", f, init, own}}, {context.d_model});
  if (config.bias)
    bias_ = stacked_parameter({{"gate.bias", f, zero, own}, {"up.bias", f, zero, own}}, {}, {.decay = false});
  down_ = child<Linear>("down", f, context.d_model, config.bias, context.residual_std, down_split(config, context));
}

Variable SwiGlu::forward(const Variable& x) {
  return down_->finish([&](const Variable& w, const Variable& b) {
    return swiglu_feed_forward(copy_to_group(x, group_), gate_up_, bias_.defined() ? bias_.variable() : Variable(), w, b);
  });
}

GeluGated::GeluGated(const MlpConfig& config, const LayerContext& context)
    : up_(child<Linear>("ffn.proj_up", context.d_model, 2 * config.hidden, config.bias, context.init_std,
                        up_split(config, context, 2))),
      down_(child<Linear>("ffn.proj_down", config.hidden, context.d_model, config.bias, context.residual_std,
                          down_split(config, context))) {}

Variable GeluGated::forward(const Variable& x) { return down_->forward(geglu_packed(up_->forward(x), GeluForm::erf)); }

std::shared_ptr<FeedForward> make_mlp(const MlpConfig& config, const LayerContext& context) {
  if (config.type == "none") return nullptr;
  if (config.type == "swiglu") return std::make_shared<SwiGlu>(config, context);
  if (config.type == "gelu_gated") return std::make_shared<GeluGated>(config, context);
  if (config.type == "kan") return std::make_shared<KanMlp>(config.kan, config.squash, config.hidden, context);
  if (config.type == "moe") return std::make_shared<Moe>(config, context);
  return std::make_shared<Mlp>(config, context);
}

}  // namespace krait::layers

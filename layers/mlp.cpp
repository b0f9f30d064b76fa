#include "layers/mlp.h"

#include "autograd/activation.h"
#include "layers/kan.h"
#include "layers/moe.h"

namespace krait::layers {

Mlp::Mlp(const MlpConfig& config, const LayerContext& context)
    : type_(config.type),
      fc_(child<Linear>("fc", context.d_model, config.hidden, config.bias, context.init_std)),
      proj_(child<Linear>("proj", config.hidden, context.d_model, config.bias, context.residual_std)) {}

Variable Mlp::forward(const Variable& x) {
  if (type_ == "gelu_tanh") return proj_->forward(fc_->forward(x, Epilogue::gelu_tanh));
  if (type_ == "gelu") return proj_->forward(fc_->forward(x, Epilogue::gelu_erf));
  const Variable h = fc_->forward(x);
  return proj_->forward(type_ == "silu" ? silu(h) : relu2(h));
}

SwiGlu::SwiGlu(const MlpConfig& config, const LayerContext& context) {
  const Initializer init = normal(context.init_std), zero = constant(0.0);
  const int64_t f = config.hidden;
  gate_up_ = stacked_parameter({{"gate.weight", f, init}, {"up.weight", f, init}}, {context.d_model});
  if (config.bias)
    bias_ = stacked_parameter({{"gate.bias", f, zero}, {"up.bias", f, zero}}, {}, {.decay = false});
  down_ = child<Linear>("down", f, context.d_model, config.bias, context.residual_std);
}

Variable SwiGlu::forward(const Variable& x) {
  const Variable both = linear(x, gate_up_, bias_.defined() ? bias_.variable() : Variable());
  return down_->forward(swiglu_packed(both));
}

GeluGated::GeluGated(const MlpConfig& config, const LayerContext& context)
    : up_(child<Linear>("ffn.proj_up", context.d_model, 2 * config.hidden, config.bias, context.init_std)),
      down_(child<Linear>("ffn.proj_down", config.hidden, context.d_model, config.bias, context.residual_std)) {}

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

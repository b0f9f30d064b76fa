#include "layers/moe.h"

#include "autograd/linear.h"
#include "autograd/shape.h"

namespace krait::layers {

Moe::Moe(const MlpConfig& config, const LayerContext& context)
    : tensor_(context.parallel.tensor), sequence_(context.parallel.sequence),
      own_(owned(tensor_, config.moe.n_experts, "model.mlp.n_experts", "experts")),
      config_(config.moe), options_{config.moe.n_experts, config.moe.top_k, config.moe.renormalize} {
  const int64_t m = context.d_model, f = config.hidden, e = config_.n_experts;
  const Initializer init = normal(context.init_std);
  router_ = parameter("router.weight", {e + config_.n_null_experts, m}, init, {.keep_fp32 = true});
  gate_up_ = stacked_parameter({{"gate", e, init, own_.rows()}, {"up", e, init, own_.rows()}}, {f, m});
  down_ = parameter("down", {e, m, f}, normal(context.residual_std), {}, own_.rows());
}

Variable Moe::logits(const Variable& x) const { return linear(cast(x, accum_dtype(x.dtype())), router_); }

MoeLosses Moe::losses(const Variable& x) const {
  const Variable r = logits(x);
  return moe_losses(r, kernels::moe_route(r.data(), options_), options_);
}

Variable Moe::forward_padded(const Variable& x, const Tensor& lengths) {
  const Variable rows = reshape(x, {x.shape().numel() / x.size(-1), x.size(-1)});
  const double scale = training() ? auxiliary_scale_ : 0.0;
  const MoeRoute chosen =
      moe_route(logits(rows), options_, {scale * config_.balance_coef, scale * config_.z_coef}, *sequence_, lengths);
  auxiliary_loss_ = chosen.penalty;
  const MoeRoute own{copy_to_group(chosen.weight, tensor_), kernels::moe_part(chosen.routing, own_.begin, own_.count())};
  return reshape(reduce_from_group(moe_experts(copy_to_group(rows, tensor_), own, gate_up_, down_), tensor_), x.shape());
}

// Of all experts, which the parameter count takes for used, a token visits top_k, less the null ones among them when
// the slots are in balance.
double Moe::extra_flops_per_token() const {
  const double slots = static_cast<double>(config_.n_experts + config_.n_null_experts);
  const double unused = 1.0 - static_cast<double>(config_.top_k) / slots;
  return -2.0 * unused * static_cast<double>(gate_up_.shape().numel() + down_.shape().numel());
}

}  // namespace krait::layers

#include "layers/norm.h"

#include "autograd/elementwise.h"

namespace krait::layers {

Norm::Norm(int64_t d_model, const NormConfig& config) : config_(config) {
  const ParameterOptions options{.decay = false, .keep_fp32 = true};
  weight_ = parameter("weight", {d_model}, constant(config.type == "layer_1p" ? 0.0 : 1.0), options);
  if (config.type == "layer") bias_ = parameter("bias", {d_model}, constant(0.0), options);
}

Variable Norm::weight() const { return config_.type == "layer_1p" ? weight_.variable() + 1.0 : weight_.variable(); }

Variable Norm::forward(const Variable& x) const {
  if (config_.type == "rms") return rms_norm(x, weight_, config_.eps);
  return layer_norm(x, weight(), bias(), config_.eps);
}

AddNorm Norm::forward_add(const Variable& x, const Variable& residual) const {
  if (config_.type == "rms") return add_rms_norm(x, residual, weight_, config_.eps);
  return add_layer_norm(x, residual, weight(), bias(), config_.eps);
}

}  // namespace krait::layers

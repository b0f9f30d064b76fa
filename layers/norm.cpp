#include "layers/norm.h"

#include "autograd/layer_norm.h"

namespace krait::layers {

namespace {
double weight_offset(const NormConfig& config) { return config.type == "layer_1p" ? 1.0 : 0.0; }
}  // namespace

Norm::Norm(int64_t d_model, const NormConfig& config, comm::GroupPtr shared)
    : config_(config), shared_(std::move(shared)) {
  const ParameterOptions options{.decay = false, .keep_fp32 = true};
  weight_ = parameter("weight", {d_model}, constant(config.type == "layer_1p" ? 0.0 : 1.0), options);
  if (config.type == "layer") bias_ = parameter("bias", {d_model}, constant(0.0), options);
}

Variable Norm::weight() const { return copy_to_group(weight_, shared_); }

Variable Norm::forward(const Variable& x) const {
  if (config_.type == "rms") return rms_norm(x, weight(), config_.eps);
  return layer_norm(x, weight(), bias(), config_.eps, weight_offset(config_));
}

AddNorm Norm::forward_add(const Variable& x, const Variable& residual) const {
  if (config_.type == "rms") return add_rms_norm(x, residual, weight(), config_.eps);
  return add_layer_norm(x, residual, weight(), bias(), config_.eps, weight_offset(config_));
}

}  // namespace krait::layers

#include "layers/gated_cnn.h"

#include <cmath>

#include "autograd/activation.h"
#include "autograd/causal_conv1d.h"
#include "autograd/shape.h"
#include "kernels/gated_cnn_step.h"
#include "layers/sequence_history.h"

namespace krait::layers {

// The public code truncates its normal weights at 100 standard deviations: plain normal ones.
GatedCnn::GatedCnn(const GatedCnnConfig& config, const LayerContext& context)
    : config_(config), tensor_(context.parallel.tensor), sequence_(context.parallel.sequence) {
  const int64_t f = config.hidden, c = config.conv_channels;
  const double bound = 1.0 / std::sqrt(static_cast<double>(config.d_conv));
  const Owned plain = owned_uneven(tensor_, f - c), mixed = owned(tensor_, c, "model.gated_cnn.conv_ratio", "convolved channels");
  config_.conv_channels = mixed.count();
  config_.hidden = plain.count() + mixed.count();
  Shard up{0, {plain.range(1), mixed.range(1, f - c), plain.range(1, f), mixed.range(1, 2 * f - c)}};
  Shard down{1, {plain.range(1), mixed.range(1, f - c)}};
  fc1_ = child<Linear>("fc1", context.d_model, 2 * f, true, context.init_std, LinearSplit{tensor_, up});
  conv_weight_ = parameter("conv.weight", {c, config.d_conv}, uniform(-bound, bound), {}, mixed.rows());
  conv_bias_ = parameter("conv.bias", {c}, uniform(-bound, bound), {.decay = false}, mixed.rows());
  fc2_ = child<Linear>("fc2", f, context.d_model, true, context.init_std, LinearSplit{tensor_, down});
}

GatedCnn::Projected GatedCnn::project(const Variable& u) const {
  const int64_t f = config_.hidden, c = config_.conv_channels;
  const Variable all = fc1_->forward(u);
  if (c == f) {
    const Vars parts = split(all, {f, c}, 2);
    return {parts[0], {}, parts[1]};
  }
  const Vars parts = split(all, {f, f - c, c}, 2);
  return {parts[0], parts[1], parts[2]};
}

Variable GatedCnn::finish(const Projected& in, const Variable& convolved) const {
  const Variable up = in.plain.defined() ? concat({in.plain, convolved}, 2) : convolved;
  return fc2_->forward(geglu(in.gate, up, GeluForm::erf));
}

Variable GatedCnn::forward(const Variable& u, const SequenceInfo& info, LayerState* state) {
  const Projected in = project(u);
  const Variable carried = state ? Variable(state->tensors.at("conv")) : Variable();
  const Variable before = convolution_history(in.mixed, config_.d_conv - 1, sequence_, info.segments, carried);
  const ConvOut conv = causal_conv1d(in.mixed, conv_weight_, conv_bias_, before, false, info.segments);
  if (state) {
    state->tensors.at("conv") = from_last_piece(conv.final_state.data(), sequence_);
    state->length += u.size(1) * sequence_->size();
  }
  return finish(in, conv.y);
}

Tensor GatedCnn::step(const Tensor& u, LayerState& state) {
  const NoGrad guard;
  const Tensor all = fc1_->forward(Variable(u)).data().select(1, 0);
  const Tensor y = kernels::gated_cnn_step(state.tensors.at("conv"), all, conv_weight_.variable().data(), conv_bias_.variable().data());
  ++state.length;
  return fc2_->forward(Variable(y.unsqueeze(1))).data();
}

LayerState GatedCnn::initial_state(int64_t batch, int64_t /*max_length*/, DType dtype, Device device) const {
  LayerState s;
  s.tensors["conv"] = zeros({batch, config_.d_conv - 1, config_.conv_channels}, dtype, device);
  return s;
}

// The convolution's weights are counted with the matrices.
double GatedCnn::extra_flops_per_token(int64_t /*context*/) const { return 0; }

std::string GatedCnn::kernel_name(int64_t, int64_t, DType, Device device, bool) const {
  const bool slow = device.is_cuda() && config_.d_conv > 8;
  return slow ? "causal convolution, slow beyond 8 taps" : "causal convolution, one pass";
}

LayerKind gated_cnn_kind() {
  return {"gated_cnn",
          [](ConfigNode& section, const ModelConfig& model) { read_gated_cnn_config(section, model.d_model); },
          [](ConfigNode options, const LayerContext& context) -> std::shared_ptr<Mixer> {
            return std::make_shared<GatedCnn>(read_gated_cnn_config(options, context.d_model), context);
          }};
}

}  // namespace krait::layers

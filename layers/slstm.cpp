#include "layers/slstm.h"

#include <cmath>

#include "autograd/causal_conv1d.h"
#include "autograd/elementwise.h"
#include "autograd/head_norm.h"
#include "autograd/shape.h"
#include "autograd/slstm.h"
#include "layers/xlstm_init.h"

namespace krait::layers {

namespace {

// b (4, h, p): the forget gates' power law, 0 elsewhere.
Initializer gate_bias(int64_t block, int64_t blocks) {
  return [=](Tensor& value, uint64_t) {
    zero_(value);
    const int64_t h = value.size(1), p = value.size(2);
    double* forget = value.data<double>() + h * p;
    for (int64_t i = 0; i < h * p; ++i) forget[i] = slstm_forget_bias(i % p, p, block, blocks);
  };
}

}  // namespace

double slstm_forget_bias(int64_t unit, int64_t units, int64_t block, int64_t blocks) {
  if (units == 1) return 5.0;
  const double depth = blocks > 1 ? static_cast<double>(block) / static_cast<double>(blocks - 1) : 0.0;
  return 5.0 - 12.0 * std::pow(static_cast<double>(unit) / static_cast<double>(units - 1), 0.3 + 1.3 * depth);
}

Slstm::Slstm(const SlstmConfig& config, const LayerContext& context)
    : config_(config), d_model_(context.d_model), norm_eps_(context.norm_eps) {
  const int64_t h = config.n_heads, p = context.d_model / h;
  const Initializer small = normal(small_std(context.d_model));
  if (config.conv > 0) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(config.conv));
    conv_weight_ = parameter("conv1d.weight", {context.d_model, config.conv}, uniform(-bound, bound));
    conv_bias_ = parameter("conv1d.bias", {context.d_model}, uniform(-bound, bound), {.decay = false});
  }
  w_i_ = parameter("igate.weight", {h, p, p}, small);
  w_f_ = parameter("fgate.weight", {h, p, p}, small);
  w_z_ = parameter("zgate.weight", {h, p, p}, small);
  w_o_ = parameter("ogate.weight", {h, p, p}, small);
  const double bound = 1.0 / std::sqrt(static_cast<double>(context.d_model));
  R_ = parameter("R", {h, 4, p, p}, config.recurrent_init == "zeros" ? constant(0.0) : uniform(-bound, bound),
                 {.decay = false});
  b_ = parameter("b", {4, h, p}, gate_bias(context.layer_index, context.n_layers), {.decay = false, .keep_fp32 = true});
  norm_weight_ =
      parameter("group_norm.weight", {context.d_model}, constant(0.0), {.decay = false, .keep_fp32 = true});
}

Variable Slstm::forward(const Variable& x, const SequenceInfo& info, LayerState* state) {
  Variable u = x;
  if (config_.conv > 0) {
    const Variable before = state ? Variable(state->tensors.at("conv")) : Variable();
    const ConvOut conv = causal_conv1d(x, conv_weight_, conv_bias_, before, true, info.segments);
    u = conv.y;
    if (state) state->tensors["conv"] = conv.final_state.data();
  }
  const Variable gates = slstm_gates(u, x, w_i_, w_f_, w_z_, w_o_);
  const auto [y, last] = slstm(gates, R_, b_, state ? Variable(state->tensors.at("cell").transpose(0, 1).contiguous()) : Variable(), info.segments,
                               config_.forget_gate == "exp" ? SlstmForget::exp : SlstmForget::sigmoid);
  if (state) {
    state->tensors["cell"] = last.data().transpose(0, 1);
    state->length += x.size(1);
  }
  return reshape(head_norm(y, norm_weight_.variable() + 1.0, norm_eps_), x.shape());
}

Tensor Slstm::step(const Tensor& x, LayerState& state) {
  const NoGrad guard;
  return forward(Variable(x), {}, &state).data();
}

LayerState Slstm::initial_state(int64_t batch, int64_t, DType dtype, Device device) const {
  LayerState s;
  s.tensors["cell"] = zeros({batch, 4, config_.n_heads, d_model_ / config_.n_heads}, accum_dtype(dtype), device);
  if (config_.conv > 0) s.tensors["conv"] = zeros({batch, config_.conv - 1, d_model_}, dtype, device);
  return s;
}

std::shared_ptr<FeedForward> Slstm::own_feed_forward(const LayerContext& context) const {
  if (config_.hidden == 0) return nullptr;
  MlpConfig mlp;
  mlp.type = "gelu_gated";
  mlp.hidden = config_.hidden;
  LayerContext own = context;
  own.init_std = small_std(context.d_model);
  own.residual_std = wang_std(context.n_layers, context.d_model);
  return make_mlp(mlp, own);
}

double Slstm::extra_flops_per_token(int64_t) const {
  // The product with R, which is not decayed and so not counted among the matrices.
  return 2.0 * static_cast<double>(4 * d_model_ * (d_model_ / config_.n_heads));
}

std::string Slstm::kernel_name(int64_t, int64_t, DType, Device device, bool) const {
  return device.is_cuda() ? "one persistent kernel over the sequence, recurrent weights on chip"
                          : "recurrent loop over packed weights, heads and batch in parallel";
}

LayerKind slstm_kind() {
  return {"slstm",
          [](ConfigNode& section, const ModelConfig& model) { read_slstm_config(section, model.d_model); },
          [](ConfigNode options, const LayerContext& context) -> std::shared_ptr<Mixer> {
            return std::make_shared<Slstm>(read_slstm_config(options, context.d_model), context);
          }};
}

}  // namespace krait::layers

#include "layers/linear_attention.h"

#include "autograd/elementwise.h"
#include "autograd/shape.h"
#include "kernels/linear_attention_step.h"
#include "kernels/ssd.h"

namespace krait::layers {

namespace {

// Evenly from 3 to 6 over the heads.
void gate_bias(Tensor& value, uint64_t /*key*/) {
  const int64_t h = value.numel();
  for (int64_t i = 0; i < h; ++i)
    value.data<double>()[i] = h == 1 ? 4.5 : 3.0 + 3.0 * static_cast<double>(i) / static_cast<double>(h - 1);
}

}  // namespace

LinearAttention::LinearAttention(const LinearAttentionConfig& config, const LayerContext& context)
    : config_(config), sequence_(context.parallel.sequence), tensor_(context.parallel.tensor) {
  const int64_t m = context.d_model, h = config.n_heads;
  const Initializer init = normal(context.init_std), zero = constant(0.0);
  const Owned own = owned(tensor_, h, "model.linear_attention.n_heads", "heads");
  const Shard rows = own.rows(config.head_dim);
  config_.n_heads = own.count();
  qkv_weight_ = stacked_parameter(
      {{"wq.weight", m, init, rows}, {"wk.weight", m, init, rows}, {"wv.weight", m, init, rows}}, {m});
  if (config.bias)
    qkv_bias_ = stacked_parameter(
        {{"wq.bias", m, zero, rows}, {"wk.bias", m, zero, rows}, {"wv.bias", m, zero, rows}}, {}, {.decay = false});
  if (config.gate) {
    gate_weight_ = parameter("wg.weight", {h, m}, init, {}, own.rows());
    gate_bias_ = parameter("wg.bias", {h}, gate_bias, {.decay = false, .keep_fp32 = true}, own.rows());
  }
  out_ = child<Linear>("wo", m, m, config.bias, context.residual_std, LinearSplit{tensor_, own.columns(config.head_dim)});
}

// q, k and v (b, l, 3 h, head_dim).
Variable LinearAttention::qkv(const Variable& u) const {
  return reshape(linear(u, qkv_weight_, qkv_bias_.defined() ? qkv_bias_.variable() : Variable()),
                 {u.size(0), u.size(1), 3 * config_.n_heads, config_.head_dim});
}

LinearAttention::Projected LinearAttention::project(const Variable& u, const Variable& of_u) const {
  const int64_t h = config_.n_heads;
  const Vars parts = split(of_u, {h, h, h}, 2);
  if (!config_.gate) return {parts[0], parts[1], parts[2], {}};
  const Variable logits = cast(linear(u, gate_weight_), accum_dtype(u.dtype())) + gate_bias_.variable();
  return {parts[0], parts[1], parts[2], logsigmoid(logits)};
}

LinearAttentionOptions LinearAttention::options(const Tensor& segments) const {
  const auto feature = config_.feature == "elu1" ? FeatureMap::elu1 : FeatureMap::identity;
  return {feature, config_.eps, config_.chunk_size, segments, {}};
}

Variable LinearAttention::forward(const Variable& u, const SequenceInfo& info, LayerState* state) {
  const Variable own = copy_to_group(u, tensor_);
  const Projected in = project(own, qkv(own));
  const Variable before = state ? Variable(state->tensors.at("S")) : Variable();
  LinearAttentionOptions with = options(info.segments);
  with.pieces = sequence_pieces(sequence_, info.segments);
  const LinearAttentionOut out = linear_attention(in.q, in.k, in.v, in.g, before, with);
  if (state) {
    state->tensors.at("S") = out.state.data();
    state->length += u.size(1) * sequence_->size();
  }
  return out_->forward(reshape(out.y, {u.size(0), u.size(1), config_.n_heads * config_.head_dim}));
}

Tensor LinearAttention::step(const Tensor& whole, LayerState& state) {
  const NoGrad guard;
  const int64_t b = whole.size(0), h = config_.n_heads, d = config_.head_dim;
  const Variable u = copy_to_group(Variable(whole), tensor_), all = qkv(u);
  Tensor& S = state.tensors.at("S");
  kernels::LinearAttentionStep step{config_.feature == "elu1", config_.eps, {}, {}, {}};
  if (config_.gate) {
    step.u = u.data().select(1, 0);
    step.gate_weight = gate_weight_.variable().data();
    step.gate_bias = gate_bias_.variable().data();
  }
  Tensor y = kernels::linear_attention_step(S, all.data().reshape({b, 3, h, d}), step);
  if (!y.defined()) {
    const Projected in = project(u, all);
    const auto now = [](const Variable& v) { return v.defined() ? v.data().select(1, 0) : Tensor(); };
    y = linear_attention_step(S, now(in.q), now(in.k), now(in.v), now(in.g), options({}));
  }
  ++state.length;
  return out_->forward(Variable(y.reshape({b, 1, h * d}))).data();
}

LayerState LinearAttention::initial_state(int64_t batch, int64_t /*max_length*/, DType dtype, Device device) const {
  LayerState s;
  const int64_t rows = linear_attention_rows(options({}).feature, config_.head_dim);
  s.tensors["S"] = zeros({batch, config_.n_heads, rows, config_.head_dim}, accum_dtype(dtype), device);
  return s;
}

double LinearAttention::extra_flops_per_token(int64_t context) const {
  const int64_t q = std::min(config_.chunk_size, context), d = config_.head_dim, h = config_.n_heads * tensor_->size();
  return static_cast<double>(2 * q * d * h + 4 * d * d * h);
}

std::string LinearAttention::kernel_name(int64_t, int64_t, DType dtype, Device device, bool) const {
  return kernels::ssd_kernel_name(dtype, device);
}

LayerKind linear_attention_kind() {
  return {"linear_attention",
          [](ConfigNode& section, const ModelConfig& model) { read_linear_attention_config(section, model.d_model); },
          [](ConfigNode options, const LayerContext& context) -> std::shared_ptr<Mixer> {
            return std::make_shared<LinearAttention>(read_linear_attention_config(options, context.d_model), context);
          }};
}

}  // namespace krait::layers

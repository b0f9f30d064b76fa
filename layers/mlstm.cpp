#include "layers/mlstm.h"

#include <cmath>

#include "autograd/activation.h"
#include "autograd/elementwise.h"
#include "autograd/gate_linear.h"
#include "autograd/head_norm.h"
#include "autograd/mlstm_block.h"
#include "autograd/shape.h"
#include "layers/sequence_history.h"
#include "layers/xlstm_init.h"

namespace krait::layers {

namespace {

constexpr ParameterOptions kPlain{.decay = false};
constexpr ParameterOptions kExact{.decay = false, .keep_fp32 = true};

// From 3 to 6 over the heads: half-lives of 14 to 280 positions.
Initializer forget_bias() {
  return [](Tensor& value, uint64_t) {
    const int64_t n = value.numel();
    for (int64_t h = 0; h < n; ++h)
      value.data<double>()[h] = n == 1 ? 3.0 : 3.0 + 3.0 * static_cast<double>(h) / static_cast<double>(n - 1);
  };
}

}  // namespace

Variable MlstmMixer::forward(const Variable& x, const SequenceInfo& info, LayerState* state) {
  const Variable y = mix(x, info, state, false);
  if (state) state->length += x.size(1) * sequence_->size();
  return y;
}

Tensor MlstmMixer::step(const Tensor& x, LayerState& state) {
  const NoGrad guard;
  const Tensor y = mix(Variable(x), {}, &state, true).data();
  ++state.length;
  return y;
}

Variable MlstmMixer::cell(const Variable& q, const Variable& k, const Variable& v, const Variable& gates,
                          const SequenceInfo& info, LayerState* state, bool recurrent,
                          const MlstmHeadOutput& output) const {
  const int64_t b = q.size(0), l = q.size(1);
  const Vars g = chunk(gates, 2, -1);
  if (recurrent) {
    kernels::MlstmState memory{state->tensors.at("c"), state->tensors.at("n"), state->tensors.at("m")};
    const auto heads = [&](const Variable& x, int64_t d) { return x.data().reshape({b, heads_, d}); };
    const Tensor h = kernels::mlstm_step(heads(q, dq_), heads(k, dq_), heads(v, dv_), g[0].data().select(1, 0),
                                         g[1].data().select(1, 0), memory, options_.eps);
    return Variable(h.view({b, 1, heads_, dv_}));
  }
  MlstmMemory memory;
  if (state)
    memory = {Variable(state->tensors.at("c")), Variable(state->tensors.at("n")), state->tensors.at("m")};
  const MlstmResult r = mlstm(reshape(q, {b, l, heads_, dq_}), reshape(k, {b, l, heads_, dq_}),
                              reshape(v, {b, l, heads_, dv_}), g[0], g[1], memory, info.segments, options_,
                              sequence_pieces(sequence_, info.segments), output);
  if (state) {
    state->tensors["c"] = r.last.c.data();
    state->tensors["n"] = r.last.n.data();
    state->tensors["m"] = r.last.m;
  }
  return r.h;
}

LayerState MlstmMixer::initial_state(int64_t batch, int64_t, DType dtype, Device device) const {
  const DType a = accum_dtype(dtype);
  LayerState s;
  s.tensors["c"] = zeros({batch, heads_, dq_, dv_}, a, device);
  s.tensors["n"] = zeros({batch, heads_, dq_}, a, device);
  s.tensors["m"] = zeros({batch, heads_}, a, device);
  return s;
}

double MlstmMixer::extra_flops_per_token(int64_t context) const {
  const auto chunk_length = static_cast<double>(std::min(options_.chunk, context));
  const auto dq = static_cast<double>(dq_), dv = static_cast<double>(dv_);
  return static_cast<double>(heads_ * tensor_->size()) * (chunk_length * (dq + dv) + 4 * dq * dv);  // inside the chunk, and the state
}

std::string MlstmMixer::kernel_name(int64_t, int64_t, DType dtype, Device device, bool) const {
  return kernels::mlstm_kernel_name(dtype, device, dq_, dv_);
}

Mlstm::Mlstm(const MlstmConfig& c, const LayerContext& context)
    : MlstmMixer(c.n_heads, "model.mlstm.n_heads", c.inner / c.n_heads, c.inner / c.n_heads,
                 {.eps = c.eps, .denominator_gradient = c.denominator_gradient, .chunk = c.chunk_size}, context),
      config_(c) {
  const int64_t e = c.inner, size = c.qkv_block_size;
  const Initializer small = normal(small_std(context.d_model)), zero = constant(0.0);
  const double bound = 1.0 / std::sqrt(static_cast<double>(c.conv));
  const int64_t h = c.n_heads, p = e / h;
  config_.inner = heads_ * p;
  KRAIT_CHECK(config_.inner % size == 0,
              "model.mlstm.qkv_block_size: blocks of {} do not fit into {} channels, the share of each of {} processes "
              "(parallelism.tensor)", size, config_.inner, tensor_->size());
  const Shard rows = own_.rows(p), heads = own_.rows(), up{0, {own_.range(p), own_.range(p, e)}};
  const Shard blocks{0, {{own_.begin * p / size, own_.end * p / size}}};
  const Shard qkv{1, {own_.range(p), own_.range(p, e), own_.range(p, 2 * e)}};
  up_ = child<Linear>("proj_up", context.d_model, 2 * e, false, small_std(context.d_model), LinearSplit{tensor_, up});
  conv_weight_ = parameter("conv1d.weight", {e, c.conv}, uniform(-bound, bound), {}, rows);
  conv_bias_ = parameter("conv1d.bias", {e}, uniform(-bound, bound), kPlain, rows);
  q_ = parameter("q_proj.weight", {e / size, size, size}, small, {}, blocks);
  k_ = parameter("k_proj.weight", {e / size, size, size}, small, {}, blocks);
  v_ = parameter("v_proj.weight", {e / size, size, size}, small, {}, blocks);
  gate_weight_ = stacked_parameter({{"igate.weight", h, zero, qkv}, {"fgate.weight", h, zero, qkv}}, {3 * e});
  gate_bias_ = stacked_parameter({{"igate.bias", h, normal(0.1), heads}, {"fgate.bias", h, forget_bias(), heads}}, {}, kExact);
  norm_ = parameter("outnorm.weight", {e}, zero, kExact, rows);
  skip_ = parameter("learnable_skip", {e}, constant(1.0), kPlain, rows);
  down_ = child<Linear>("proj_down", e, context.d_model, false, wang_std(context.n_layers, context.d_model),
                        LinearSplit{tensor_, own_.columns(p)});
}

kernels::MlstmStepMapsWeights Mlstm::maps_weights() const {
  const auto data = [](const Parameter& p) { return p.variable().data(); };
  return {data(conv_weight_), data(conv_bias_), {data(q_), data(k_), data(v_), data(gate_weight_)}};
}

bool Mlstm::keep_recent_positions(LayerState& state, DType dtype) const {
  if (tensor_->size() > 1) return false;
  std::map<std::string, Tensor>& t = state.tensors;
  const kernels::MlstmRecent recent = kernels::mlstm_recent({t.at("c"), t.at("n"), t.at("m")}, t.at("conv"), maps_weights());
  if (!recent.count.defined()) return false;
  t["c"] = t.at("c").to(dtype);
  t["recent_k"] = recent.k;
  t["recent_v"] = recent.v;
  t["recent_gates"] = recent.gates;
  t["recent_count"] = recent.count;
  t["recent_arrived"] = recent.arrived;
  return true;
}

// mix() of one position.
Variable Mlstm::advance(const Variable& x, LayerState& state) {
  const Tensor up = up_->forward(x).data().select(1, 0);
  const int64_t e = config_.inner;
  const auto data = [](const Parameter& p) { return p.variable().data(); };
  std::map<std::string, Tensor>& t = state.tensors;
  kernels::MlstmStepMaps in = kernels::mlstm_step_maps(t.at("conv"), up.slice(1, 0, e), maps_weights());
  const Variable gates(in.gates.view({in.gates.size(0), in.gates.size(1), 2, heads_ * tensor_->size()}));
  in.gates = reduce_scatter_to_group(gates, -1, tensor_).data().reshape({in.gates.size(0), in.gates.size(1), 2 * heads_});
  kernels::MlstmState memory{t.at("c"), t.at("n"), t.at("m")};
  const Tensor z = up.slice(1, e, 2 * e);
  const kernels::MlstmStepOutputWeights weights{data(gate_bias_), data(norm_), data(skip_), options_.eps, config_.norm_eps};
  Tensor y;
  if (t.contains("recent_count")) {
    kernels::MlstmRecent recent{t.at("recent_k"), t.at("recent_v"), t.at("recent_gates"), t.at("recent_count"), t.at("recent_arrived")};
    y = kernels::mlstm_step_output(memory, recent, in, z, weights);
  } else {
    y = kernels::mlstm_step_output(memory, in, z, weights);
  }
  return down_->forward(Variable(y.unsqueeze(1)));
}

Variable Mlstm::mix(const Variable& x, const SequenceInfo& info, LayerState* state, bool recurrent) {
  if (recurrent) return advance(x, *state);
  KRAIT_CHECK(!state || !state->tensors.contains("recent_count"), "mlstm: a state that is behind its positions serves single steps only");
  const MlstmHalves up = mlstm_halves(up_->forward(x));
  const Variable carried = state ? Variable(state->tensors.at("conv")) : Variable();
  const Variable history = convolution_history(up.x_m, config_.conv - 1, sequence_, info.segments, carried);
  const MlstmConvolved conv = mlstm_conv_maps(up, conv_weight_, conv_bias_, history, info.segments, q_, k_, v_, gate_weight_);
  if (state) state->tensors["conv"] = from_last_piece(conv.final_state.data(), sequence_);
  const MlstmMapped& in = conv.maps;
  // The gates look at all channels: every member's part of every head's, then each head's sum where the head is.
  const Variable partial = reshape(in.gates, {x.size(0), x.size(1), 2, heads_ * tensor_->size()});
  const Variable gates =
      reshape(reduce_scatter_to_group(partial, -1, tensor_), {x.size(0), x.size(1), 2 * heads_}) + gate_bias_;
  const MlstmHeadOutput output{norm_.variable() + 1.0, skip_, in.x_c, up.z, config_.norm_eps, up.gradient};
  return down_->forward(cell(in.q, in.k, in.v, gates, info, state, false, output));
}

LayerState Mlstm::initial_state(int64_t batch, int64_t max_length, DType dtype, Device device) const {
  LayerState s = MlstmMixer::initial_state(batch, max_length, dtype, device);
  s.tensors["conv"] = zeros({batch, config_.conv - 1, config_.inner}, dtype, device);
  return s;
}

MlstmLarge::MlstmLarge(const MlstmLargeConfig& c, const LayerContext& context)
    : MlstmMixer(c.n_heads, "model.mlstm_large.n_heads", c.qk_width / c.n_heads, context.d_model / c.n_heads,
                 {.eps = c.eps, .denominator_gradient = c.denominator_gradient, .chunk = c.chunk_size}, context),
      config_(c) {
  const int64_t d = context.d_model;
  const Initializer small = normal(small_std(context.d_model)), zero = constant(0.0);
  const int64_t h = c.n_heads;
  config_.qk_width = heads_ * dq_;
  const Shard qk = own_.rows(dq_), v = own_.rows(dv_), heads = own_.rows();
  qkvo_ = stacked_parameter({{"q.weight", c.qk_width, small, qk}, {"k.weight", c.qk_width, small, qk},
                             {"v.weight", d, small, v}, {"ogate_preact.weight", d, zero, v}}, {d});
  gate_weight_ = stacked_parameter({{"igate_preact.weight", h, zero, heads}, {"fgate_preact.weight", h, zero, heads}}, {d});
  gate_bias_ = stacked_parameter({{"igate_preact.bias", h, constant(c.input_gate_bias), heads},
                                  {"fgate_preact.bias", h, forget_bias(), heads}}, {}, kExact);
  norm_ = parameter("multihead_norm.weight", {d}, constant(1.0), kExact, v);
  out_ = child<Linear>("out_proj", d, d, false, wang_std(context.n_layers, context.d_model),
                       LinearSplit{tensor_, own_.columns(dv_)});
}

Variable MlstmLarge::mix(const Variable& whole, const SequenceInfo& info, LayerState* state, bool recurrent) {
  const Variable u = copy_to_group(whole, tensor_);
  const int64_t d = heads_ * dv_, w = config_.qk_width;
  const Vars p = split(linear(u, qkvo_), {w, w, d, d}, -1);  // q, k, v, o
  const Variable gates = config_.gate_cap * tanh((gate_linear(u, gate_weight_) + gate_bias_) / config_.gate_cap);
  const Variable h = cell(p[0], p[1], p[2], gates, info, state, recurrent);
  const Variable normed = cast(head_norm(h, norm_, config_.norm_eps), u.dtype());
  return out_->forward(sigmoid(p[3]) * reshape(normed, p[3].shape()));
}

LayerKind mlstm_kind() {
  return {"mlstm", [](ConfigNode& section, const ModelConfig& model) { read_mlstm_config(section, model.d_model); },
          [](ConfigNode options, const LayerContext& context) -> std::shared_ptr<Mixer> {
            return std::make_shared<Mlstm>(read_mlstm_config(options, context.d_model), context);
          }};
}

LayerKind mlstm_large_kind() {
  return {"mlstm_large",
          [](ConfigNode& section, const ModelConfig& model) { read_mlstm_large_config(section, model.d_model); },
          [](ConfigNode options, const LayerContext& context) -> std::shared_ptr<Mixer> {
            return std::make_shared<MlstmLarge>(read_mlstm_large_config(options, context.d_model), context);
          }};
}

}  // namespace krait::layers

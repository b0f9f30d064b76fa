#include "layers/slstm.h"

#include <cmath>

#include "autograd/causal_conv1d.h"
#include "autograd/collective.h"
#include "autograd/elementwise.h"
#include "autograd/head_norm.h"
#include "autograd/shape.h"
#include "autograd/slstm.h"
#include "core/comm/collectives.h"
#include "kernels/slstm_step.h"
#include "layers/sequence_history.h"
#include "layers/whole_sequences.h"
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
    : config_(config), sequence_(context.parallel.sequence), tensor_(context.parallel.tensor), norm_eps_(context.norm_eps) {
  const int64_t h = config.n_heads, p = context.d_model / h;
  const Owned own = owned(tensor_, h, "model.slstm.n_heads", "heads");
  const Shard heads = own.rows(), channels = own.rows(p);
  config_.n_heads = own.count();
  d_model_ = own.count() * p;
  const Initializer small = normal(small_std(context.d_model));
  if (config.conv > 0) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(config.conv));
    conv_weight_ = parameter("conv1d.weight", {context.d_model, config.conv}, uniform(-bound, bound), {}, channels);
    conv_bias_ = parameter("conv1d.bias", {context.d_model}, uniform(-bound, bound), {.decay = false}, channels);
  }
  w_i_ = parameter("igate.weight", {h, p, p}, small, {}, heads);
  w_f_ = parameter("fgate.weight", {h, p, p}, small, {}, heads);
  w_z_ = parameter("zgate.weight", {h, p, p}, small, {}, heads);
  w_o_ = parameter("ogate.weight", {h, p, p}, small, {}, heads);
  const double bound = 1.0 / std::sqrt(static_cast<double>(context.d_model));
  R_ = parameter("R", {h, 4, p, p}, config.recurrent_init == "zeros" ? constant(0.0) : uniform(-bound, bound),
                 {.decay = false}, heads);
  b_ = parameter("b", {4, h, p}, gate_bias(context.layer_index, context.n_layers), {.decay = false, .keep_fp32 = true},
                 Shard{1, {own.range()}});
  norm_weight_ =
      parameter("group_norm.weight", {context.d_model}, constant(0.0), {.decay = false, .keep_fp32 = true}, channels);
}

Slstm::Weights Slstm::weights() const {
  const auto optional = [](const Parameter& p) { return p.defined() ? p.variable() : Variable(); };
  return {optional(conv_weight_), optional(conv_bias_), w_i_, w_f_, w_z_, w_o_, R_, b_, norm_weight_};
}

Slstm::Weights Slstm::weights(int64_t first, int64_t end) const {
  Weights w = weights();
  const int64_t p = w.R.size(-1);
  for (Variable* v : {&w.w_i, &w.w_f, &w.w_z, &w.w_o, &w.R}) *v = slice(*v, 0, first, end);
  for (Variable* v : {&w.conv_weight, &w.conv_bias, &w.norm})
    if (v->defined()) *v = slice(*v, 0, first * p, end * p);
  w.b = slice(w.b, 1, first, end);
  return w;
}

// [i; f] from u, [z; o] from x, then the recurrence and the norm of each head: y (b, l, h p).
RecurrentOut Slstm::cell(const Variable& u, const Variable& x, const Weights& w, const Tensor& segments,
                         const Variable& state) const {
  const Variable gates = slstm_gates(u, x, w.w_i, w.w_f, w.w_z, w.w_o);
  const auto [y, last] = slstm(gates, w.R, w.b, state, segments, forget_gate());
  return {reshape(head_norm(y, w.norm + 1.0, norm_eps_), x.shape()), last};
}

Variable Slstm::forward(const Variable& x, const SequenceInfo& info, LayerState* state) {
  return gather_from_group(own_heads(scatter_to_group(x, 2, tensor_), info, state), 2, tensor_);
}

Variable Slstm::own_heads(const Variable& x, const SequenceInfo& info, LayerState* state) {
  if (sequence_->size() > 1) {
    Carried carried;
    if (state) carried.cell = state->tensors.at("cell").transpose(0, 1).contiguous();
    if (state && config_.conv > 0) carried.conv = state->tensors.at("conv");
    const Variable y = over_ranks(x, info, carried);
    if (!state) return y;
    state->tensors["cell"] = carried.cell.transpose(0, 1).contiguous();
    if (config_.conv > 0) state->tensors["conv"] = carried.conv;
    state->length += x.size(1) * sequence_->size();
    return y;
  }
  const Weights w = weights();
  Variable u = x;
  if (config_.conv > 0) {
    const Variable before = state ? Variable(state->tensors.at("conv")) : Variable();
    const ConvOut conv = causal_conv1d(x, w.conv_weight, w.conv_bias, before, true, info.segments);
    u = conv.y;
    if (state) state->tensors["conv"] = conv.final_state.data();
  }
  const Variable from = state ? Variable(state->tensors.at("cell").transpose(0, 1).contiguous()) : Variable();
  const auto [y, last] = cell(u, x, w, info.segments, from);
  if (state) {
    state->tensors["cell"] = last.data().transpose(0, 1).contiguous();
    state->length += x.size(1);
  }
  return y;
}

// The recurrence is not linear and cannot be cut in time: whole sequences of some heads, else of some rows, else one
// rank after the other. Everything in the layer stays within a head.
Variable Slstm::over_ranks(const Variable& x, const SequenceInfo& info, Carried& carried) const {
  const int64_t S = sequence_->size(), h = w_i_.variable().size(0);
  // Of whole sequences of this member's share, which lies along these dimensions of the states.
  const auto whole = [&](const Variable& own, const Weights& w, const Tensor& segments, int64_t of_cell, int64_t of_conv) {
    Variable u = own;
    if (config_.conv > 0) {
      const ConvOut conv = causal_conv1d(own, w.conv_weight, w.conv_bias,
                                         Variable(own_part_of(carried.conv, of_conv, *sequence_)), true, segments);
      u = conv.y;
      if (carried.conv.defined()) carried.conv = comm::all_gather(conv.final_state.data(), of_conv, *sequence_);
    }
    const auto [y, last] = cell(u, own, w, segments, Variable(own_part_of(carried.cell, of_cell, *sequence_)));
    if (carried.cell.defined()) carried.cell = comm::all_gather(last.data(), of_cell, *sequence_);
    return y;
  };
  if (h % S == 0) {
    const int64_t first = sequence_->rank() * (h / S);
    const Variable own = all_to_all(x, 2, 1, sequence_);
    return all_to_all(whole(own, weights(first, first + h / S), gather_info(info, *sequence_).segments, 2, 2), 1, 2, sequence_);
  }
  const Weights w = weights();
  if (x.size(0) % S == 0)
    return over_rows(x, info, sequence_, [&](const Variable& rows, const SequenceInfo& all) {
      return whole(rows, w, all.segments, 1, 0);
    });
  Variable both = x;  // u and x side by side
  if (config_.conv > 0) {
    const Variable before = convolution_history(x, config_.conv - 1, sequence_, info.segments, Variable(carried.conv));
    const ConvOut conv = causal_conv1d(x, w.conv_weight, w.conv_bias, before, true, info.segments);
    if (carried.conv.defined()) carried.conv = from_last_piece(conv.final_state.data(), sequence_);
    both = concat({conv.y, x}, 2);
  }
  const int64_t d = x.size(2);
  return along_chain(both, info, sequence_, {4, 1, h, d / h},
                     [&](const Variable& rows, const Tensor& segments, const Variable& from) {
                       const Variable of_x = slice(rows, 2, rows.size(2) - d, rows.size(2));
                       return cell(slice(rows, 2, 0, d), of_x, w, segments, from);
                     },
                     carried.cell);
}

Tensor Slstm::step(const Tensor& x, LayerState& state) {
  const NoGrad guard;
  require_no_state("slstm", &state, *sequence_);
  const auto data = [](const Variable& v) { return v.data(); };
  const Weights w = weights();
  Tensor conv = config_.conv > 0 ? state.tensors.at("conv") : Tensor();
  const Tensor own = scatter_to_group(Variable(x), 2, tensor_).data().select(1, 0);
  const Tensor y = kernels::slstm_step(conv, state.tensors.at("cell"), own,
                                       {data(w.conv_weight), data(w.conv_bias), data(w.w_i), data(w.w_f), data(w.w_z), data(w.w_o), data(w.R),
                                        data(w.b), data(w.norm), forget_gate(), norm_eps_});
  ++state.length;
  return gather_from_group(Variable(y.unsqueeze(1)), 2, tensor_).data();
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
  return 2.0 * static_cast<double>(4 * d_model_ * tensor_->size() * (d_model_ / config_.n_heads));
}

std::string Slstm::kernel_name(int64_t batch, int64_t, DType, Device device, bool) const {
  if (const int ranks = sequence_->size(); ranks > 1) {
    if (config_.n_heads % ranks == 0) return fmt::format("whole sequences, all-to-all by heads over {} ranks", ranks);
    return batch % ranks == 0 ? fmt::format("whole sequences, all-to-all by rows over {} ranks", ranks)
                              : fmt::format("slow: one of {} ranks after the other, {} rows in a pipeline", ranks, batch);
  }
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

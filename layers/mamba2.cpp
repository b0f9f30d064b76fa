#include "layers/mamba2.h"

#include <cmath>
#include <limits>

#include "autograd/linear.h"
#include "autograd/mamba2_inner.h"
#include "autograd/shape.h"
#include "autograd/shared_rows.h"
#include "core/random.h"
#include "kernels/ssd.h"
#include "layers/inverse_softplus.h"
#include "layers/sequence_history.h"

namespace krait::layers {

namespace {

// Values u drawn uniformly from [low, high), then mapped.
template <class Map>
Initializer mapped_uniform(double low, double high, Map map) {
  return [=](Tensor& value, uint64_t key) {
    fill_uniform_(value, low, high, key);
    for (int64_t i = 0; i < value.numel(); ++i) value.data<double>()[i] = map(value.data<double>()[i]);
  };
}

// dt log-uniform, at least 1e-4; softplus(dt_bias) = dt.
Initializer time_step_bias(double low, double high) {
  return mapped_uniform(std::log(low), std::log(high), [](double log_dt) {
    const double dt = std::max(std::exp(log_dt), 1e-4);
    return inverse_softplus(dt);
  });
}

// Rows of zeros behind those of w (out, ...), up to a multiple of 8: rows of a product's result that do not begin at
// multiples of 16 bytes cost it two thirds of its rate (H200, 32,768 x 768 x 1804, bf16: 418 us, 139 with 1808), and what
// reads pieces of them goes value by value.
Variable padded(const Variable& w) {
  const int64_t pad = w.defined() ? (8 - w.size(0) % 8) % 8 : 0;
  return pad == 0 ? w : concat({w, Variable(zeros(w.shape().with(0, pad), w.dtype(), w.device()))}, 0);
}

Variable optional(const Parameter& p) { return p.defined() ? p.variable() : Variable(); }

}  // namespace

Mamba2::Mamba2(const Mamba2Config& config, const LayerContext& context)
    : whole_(config), config_(config), sequence_(context.parallel.sequence), tensor_(context.parallel.tensor),
      groups_(owned_or_copied(tensor_, config.n_groups, "model.mamba2.n_groups", "groups of B and C")),
      eps_(context.norm_eps), dt_low_(config.dt_limit[0]),
      dt_high_(config.dt_limit[1] > 0 ? config.dt_limit[1] : std::numeric_limits<double>::infinity()) {
  const int64_t m = context.d_model, e = config.inner, h = config.heads, p = config.head_dim, n = config.d_state;
  const int64_t bc = config.n_groups * n, width = e + 2 * bc;
  const Owned own = owned(tensor_, h, "model.mamba2.head_dim", "heads");
  config_.heads = own.count();
  config_.inner = own.count() * p;
  config_.n_groups = groups_.count();
  const Shard heads = own.rows(), conv{0, {own.range(p), groups_.range(n, e), groups_.range(n, e + bc)}};
  const Shard in{0, {own.range(p), own.range(p, e), groups_.range(n, 2 * e), groups_.range(n, 2 * e + bc),
                     own.range(1, e + width)}};
  const auto limit = [](int64_t fan_in) { return 1.0 / std::sqrt(static_cast<double>(fan_in)); };
  const auto spread = [](double bound) { return uniform(-bound, bound); };
  const ParameterOptions plain{.decay = false}, exact{.decay = false, .keep_fp32 = true};
  in_weight_ = parameter("in_proj.weight", {e + width + h, m}, spread(limit(m)), {}, in);
  if (config.bias) in_bias_ = parameter("in_proj.bias", {e + width + h}, constant(0.0), plain, in);
  conv_weight_ = parameter("conv1d.weight", {width, config.d_conv}, spread(limit(config.d_conv)), {}, conv);
  if (config.conv_bias) conv_bias_ = parameter("conv1d.bias", {width}, spread(limit(config.d_conv)), plain, conv);
  dt_bias_ = parameter("dt_bias", {h}, time_step_bias(config.dt_min, config.dt_max), exact, heads);
  A_log_ = parameter("A_log", {h},
                     mapped_uniform(config.A_init_range[0], config.A_init_range[1], [](double a) { return std::log(a); }),
                     exact, heads);
  D_ = parameter("D", config.D_has_hdim ? Shape{h, p} : Shape{h}, constant(1.0), exact, heads);
  norm_weight_ = parameter("norm.weight", {e}, constant(1.0), exact, own.rows(p));
  out_weight_ = parameter("out_proj.weight", {m, e},
                          spread(limit(e) / std::sqrt(static_cast<double>(context.n_branches))), {}, own.columns(p));
  if (config.bias) out_bias_ = parameter("out_proj.bias", {m}, constant(0.0), plain);
}

// Copies of B and C: the gradients of their rows are summed over the members that hold them.
void Mamba2::share(Variable& in_weight, Variable& in_bias, Variable& conv_weight, Variable& conv_bias) const {
  if (!copied()) return;
  const int64_t n = config_.d_state, here = config_.n_groups * n, all = whole_.n_groups * n, at = groups_.begin * n;
  const auto from = [&](int64_t first) -> std::vector<SharedRows> {
    return {{first, first + here, at}, {first + here, first + 2 * here, all + at}};
  };
  const int64_t e = config_.inner;
  share_rows({{in_weight, from(2 * e)}, {in_bias, from(2 * e)}, {conv_weight, from(e)}, {conv_bias, from(e)}}, 2 * all, tensor_);
}

Mamba2::Out Mamba2::apply(const Variable& u, const Variable& conv, const Variable& ssm, const Tensor& segments,
                          bool keep_state) const {
  SequencePieces pieces = sequence_pieces(sequence_, segments);
  pieces.last = ssm.defined();
  const bool sums = tensor_->size() > 1;
  Variable in_weight = in_weight_, in_bias = optional(in_bias_), conv_weight = conv_weight_, conv_bias = optional(conv_bias_);
  share(in_weight, in_bias, conv_weight, conv_bias);
  const Variable zxbcdt = linear(copy_to_group(u, tensor_), padded(in_weight), padded(in_bias));
  const NormMembers members = copied() ? NormMembers{tensor_, whole_.n_groups, groups_.begin} : NormMembers{};
  Mamba2InnerOut out = mamba2_inner({.zxbcdt = zxbcdt,
                                           .conv_weight = conv_weight,
                                           .conv_bias = conv_bias,
                                           .dt_bias = dt_bias_,
                                           .A_log = A_log_,
                                           .D = D_,
                                           .norm_weight = norm_weight_,
                                           .out_weight = out_weight_,
                                           .out_bias = sums ? Variable() : optional(out_bias_),
                                           .conv_state = conv,
                                           .ssm_state = ssm,
                                           .sizes = {config_.heads, config_.n_groups, config_.d_state},
                                           .options = {config_.chunk_size, segments, pieces},
                                           .dt_low = dt_low_,
                                           .dt_high = dt_high_,
                                           .norm_eps = eps_,
                                           .norm_first = config_.norm_before_gate,
                                           .keep_state = keep_state,
                                           .norm_members = members});
  const Variable y = reduce_from_group(std::move(out.y), tensor_);
  return {sums && out_bias_.defined() ? y + out_bias_ : y, out.conv_state, out.ssm_state};
}

Variable Mamba2::forward(const Variable& u, const SequenceInfo& info, LayerState* state) {
  if (!state) return apply(u, {}, {}, info.segments, false).y;
  KRAIT_CHECK(!state->tensors.contains("recent_count"), "mamba2: a state that is behind its positions serves single steps only");
  Tensor &conv = state->tensors.at("conv"), &ssm = state->tensors.at("ssm");
  const Out out = apply(u, Variable(conv), Variable(ssm), info.segments);
  conv = from_last_piece(out.conv.data(), sequence_).contiguous();
  ssm = out.ssm.data().contiguous();
  state->length += u.size(1) * sequence_->size();
  return out.y;
}

kernels::Mamba2StepWeights Mamba2::step_weights() const {
  const auto data = [](const Parameter& p) { return p.defined() ? p.variable().data() : Tensor(); };
  return {data(conv_weight_), data(conv_bias_), data(dt_bias_), data(A_log_), data(D_),
          data(norm_weight_), dt_low_, dt_high_, eps_, config_.norm_before_gate};
}

bool Mamba2::keep_recent_positions(LayerState& state, DType dtype) const {
  if (tensor_->size() > 1) return false;
  Tensor& ssm = state.tensors.at("ssm");
  const kernels::RecentPositions recent = kernels::recent_positions(ssm, state.tensors.at("conv"), step_weights());
  if (!recent.count.defined()) return false;
  ssm = ssm.to(dtype);
  state.tensors["recent_x"] = recent.x;
  state.tensors["recent_B"] = recent.B;
  state.tensors["recent_steps"] = recent.steps;
  state.tensors["recent_count"] = recent.count;
  return true;
}

Tensor Mamba2::step(const Tensor& u, LayerState& state) {
  const NoGrad guard;
  if (tensor_->size() > 1) return forward(Variable(u), {}, &state).data();
  const Tensor zxbcdt = linear(Variable(u.select(1, 0)), in_weight_, optional(in_bias_)).data();
  Tensor &conv = state.tensors.at("conv"), &ssm = state.tensors.at("ssm");
  const kernels::Mamba2StepWeights weights = step_weights();
  Tensor y;
  if (state.tensors.contains("recent_count")) {
    kernels::RecentPositions recent{state.tensors.at("recent_x"), state.tensors.at("recent_B"), state.tensors.at("recent_steps"),
                                    state.tensors.at("recent_count")};
    y = kernels::mamba2_step(conv, ssm, recent, zxbcdt, weights);
  } else {
    y = kernels::mamba2_step(conv, ssm, zxbcdt, weights);
  }
  ++state.length;
  return linear(Variable(y), out_weight_, optional(out_bias_)).data().unsqueeze(1);
}

LayerState Mamba2::initial_state(int64_t batch, int64_t /*max_length*/, DType dtype, Device device) const {
  LayerState s;
  s.tensors["conv"] = zeros({batch, config_.d_conv - 1, conv_width()}, dtype, device);
  s.tensors["ssm"] = zeros({batch, config_.heads, config_.head_dim, config_.d_state}, accum_dtype(dtype), device);
  return s;
}

double Mamba2::extra_flops_per_token(int64_t context) const {
  const Mamba2Config& c = whole_;
  const int64_t q = std::min(c.chunk_size, context), n = c.d_state, p = c.head_dim;
  const int64_t inside = q * (n * c.n_groups + p * c.heads), states = 4 * n * p * c.heads;
  return static_cast<double>(inside + states + 2 * c.d_conv * (c.inner + 2 * c.n_groups * n));
}

std::string Mamba2::kernel_name(int64_t /*batch*/, int64_t /*context*/, DType dtype, Device device,
                                bool /*has_segments*/) const {
  return kernels::ssd_kernel_name(dtype, device);
}

LayerKind mamba2_kind() {
  return {"mamba2", [](ConfigNode& section, const ModelConfig& model) { read_mamba2_config(section, model.d_model); },
          [](ConfigNode options, const LayerContext& context) -> std::shared_ptr<Mixer> {
            return std::make_shared<Mamba2>(read_mamba2_config(options, context.d_model), context);
          }};
}

}  // namespace krait::layers

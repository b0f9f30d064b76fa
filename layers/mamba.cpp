#include "layers/mamba.h"

#include <cmath>

#include "autograd/elementwise.h"
#include "autograd/linear.h"
#include "autograd/mamba_inner.h"
#include "kernels/mamba_step.h"
#include "layers/inverse_softplus.h"
#include "layers/linear.h"
#include "layers/sequence_history.h"

namespace krait::layers {

namespace {

/// U(-1/sqrt(fan_in), 1/sqrt(fan_in)) times scale.
Initializer fan_in_uniform(int64_t fan_in, double scale = 1.0) {
  const double bound = scale / std::sqrt(static_cast<double>(fan_in));
  return uniform(-bound, bound);
}

/// softplus(bias) log-uniform in [dt_min, dt_max], and at least dt_init_floor.
Initializer time_step_bias(const MambaConfig& c) {
  return [c](Tensor& value, uint64_t key) {
    fill_uniform_(value, std::log(c.dt_min), std::log(c.dt_max), key);
    double* bias = value.data<double>();
    for (int64_t i = 0; i < value.numel(); ++i) {
      const double dt = std::max(std::exp(bias[i]), c.dt_init_floor);
      bias[i] = inverse_softplus(dt);
    }
  };
}

/// Row by row log(1), log(2), ... log(n): the real parts of S4D-real.
void log_of_counts(Tensor& value, uint64_t /*key*/) {
  const int64_t n = value.size(-1);
  double* a = value.data<double>();
  for (int64_t i = 0; i < value.numel(); ++i) a[i] = std::log(static_cast<double>(i % n + 1));
}

Variable optional(const Parameter& p) { return p.defined() ? p.variable() : Variable(); }

}  // namespace

Mamba::Mamba(const MambaConfig& config, const LayerContext& context)
    : config_(config), sequence_(context.parallel.sequence), tensor_(context.parallel.tensor) {
  const int64_t d = context.d_model, e = config.d_inner, n = config.d_state, r = config.dt_rank;
  const ParameterOptions no_decay{.decay = false}, exact{.decay = false, .keep_fp32 = true};
  const Owned own = owned(tensor_, e, "model.mamba.expand", "channels");
  const Shard rows = own.rows(), x_and_z{0, {own.range(1), own.range(1, e)}};
  config_.d_inner = own.count();
  in_proj_ = parameter("in_proj.weight", {2 * e, d}, fan_in_uniform(d), {}, x_and_z);
  if (config.bias) in_bias_ = parameter("in_proj.bias", {2 * e}, constant(0.0), no_decay, x_and_z);
  conv_ = parameter("conv1d.weight", {e, config.d_conv}, fan_in_uniform(config.d_conv), {}, rows);
  if (config.conv_bias) conv_bias_ = parameter("conv1d.bias", {e}, fan_in_uniform(config.d_conv), no_decay, rows);
  x_proj_ = parameter("x_proj.weight", {r + 2 * n, e}, fan_in_uniform(e), {}, own.columns());
  dt_proj_ = parameter("dt_proj.weight", {e, r}, fan_in_uniform(r), {}, rows);
  dt_bias_ = parameter("dt_proj.bias", {e}, time_step_bias(config), exact, rows);
  A_log_ = parameter("A_log", {e, n}, log_of_counts, exact, rows);
  D_ = parameter("D", {e}, constant(1.0), exact, rows);
  const double scale = 1.0 / std::sqrt(static_cast<double>(context.n_branches));
  out_proj_ = parameter("out_proj.weight", {d, e}, fan_in_uniform(e, scale), {}, own.columns());
  if (config.bias) out_bias_ = parameter("out_proj.bias", {d}, constant(0.0), no_decay);
}

Mamba::Result Mamba::run(const Variable& u, const Tensor& segments, const Variable& conv, const Variable& ssm,
                         const comm::GroupPtr& sequence) const {
  MambaInnerArguments in{linear(copy_to_group(u, tensor_), in_proj_, optional(in_bias_)), conv_, optional(conv_bias_),
                         x_proj_, dt_proj_, dt_bias_, -exp(A_log_), D_, out_proj_};
  in.conv_state = conv;
  in.ssm_state = ssm;
  in.segments = segments;
  in.pieces = sequence_pieces(sequence, segments);
  in.pieces.last = ssm.defined();
  in.tensor = tensor_;
  MambaInnerOut inner = mamba_inner(in);
  const Variable out = reduce_from_group(std::move(inner.out), tensor_);
  return {out_bias_.defined() ? out + out_bias_ : out, inner.conv_state, inner.ssm_state};
}

Variable Mamba::advance(const Variable& x, const Tensor& segments, LayerState& state,
                        const comm::GroupPtr& sequence) const {
  Tensor &conv = state.tensors.at("conv"), &ssm = state.tensors.at("ssm");
  const Result out = run(x, segments, Variable(conv), Variable(ssm), sequence);
  conv = from_last_piece(out.conv.data(), sequence).contiguous();
  ssm = out.ssm.data().contiguous();
  state.length += x.size(1) * sequence->size();
  return out.y;
}

Variable Mamba::forward(const Variable& x, const SequenceInfo& info, LayerState* state) {
  if (!state) return run(x, info.segments, {}, {}).y;
  return advance(x, info.segments, *state, sequence_);
}

Tensor Mamba::step(const Tensor& x, LayerState& state) {
  const NoGrad guard;
  if (tensor_->size() > 1) return advance(Variable(x), {}, state, comm::single_group("sequence")).data();
  const auto data = [](const Parameter& p) { return p.defined() ? p.variable().data() : Tensor(); };
  const Tensor xz = linear(Variable(x.select(1, 0)), in_proj_, optional(in_bias_)).data();
  const Tensor y = kernels::mamba_step(state.tensors.at("conv"), state.tensors.at("ssm"), xz,
                                       {data(conv_), data(conv_bias_), data(x_proj_), data(dt_proj_), data(dt_bias_),
                                        data(A_log_), data(D_)});
  ++state.length;
  return linear(Variable(y), out_proj_, optional(out_bias_)).data().unsqueeze(1);
}

LayerState Mamba::initial_state(int64_t batch, int64_t /*max_length*/, DType dtype, Device device) const {
  LayerState s;
  s.tensors["conv"] = zeros({batch, config_.d_conv - 1, config_.d_inner}, dtype, device);
  s.tensors["ssm"] = zeros({batch, config_.d_inner, config_.d_state}, accum_dtype(dtype), device);
  return s;
}

double Mamba::extra_flops_per_token(int64_t /*context*/) const {
  // Per state: exp, its argument, two products and a sum for h, delta B x, product and sum for y. The convolution counts
  // with the matrix parameters.
  return static_cast<double>(config_.d_inner * tensor_->size()) * (9.0 * static_cast<double>(config_.d_state) + 3.0);
}

std::string Mamba::kernel_name(int64_t /*batch*/, int64_t /*context*/, DType /*dtype*/, Device device,
                               bool /*has_segments*/) const {
  if (device.is_cpu()) return "selective scan on the CPU, vector code over channels";
  return fmt::format("fused selective scan in chunks, convolution of width {}{}", config_.d_conv,
                     config_.d_conv > 8 ? " (slow: more than 8)" : "");
}

LayerKind mamba_kind() {
  return {"mamba",
          [](ConfigNode& section, const ModelConfig& model) { read_mamba_config(section, model.d_model); },
          [](ConfigNode options, const LayerContext& context) -> std::shared_ptr<Mixer> {
            return std::make_shared<Mamba>(read_mamba_config(options, context.d_model), context);
          }};
}

}  // namespace krait::layers

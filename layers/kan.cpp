#include "layers/kan.h"

#include <cmath>

#include "autograd/elementwise.h"
#include "autograd/reduce.h"
#include "kernels/kan_fit.h"

namespace krait::layers {

namespace {

// Coefficients fitted to noise U(-1/2, 1/2) amplitude / G at the G+1 inner knots.
Initializer fitted_noise(const KanOptions& o, double amplitude) {
  return [=](Tensor& value, uint64_t key) {
    const int64_t out = value.size(0), in = value.size(1), points = o.grid + 1;
    Tensor x = empty({points, in}, DType::f64, kCpu), y = empty({points, in, out}, DType::f64, kCpu);
    const double step = (o.range[1] - o.range[0]) / static_cast<double>(o.grid);
    for (int64_t j = 0; j < points; ++j)
      for (int64_t i = 0; i < in; ++i) x.data<double>()[j * in + i] = o.range[0] + step * static_cast<double>(j);
    const double bound = 0.5 * amplitude / static_cast<double>(o.grid);
    fill_uniform_(y, -bound, bound, key);
    copy_(value, kernels::fit_splines(x, y, kernels::uniform_knots(in, o.grid, o.order, o.range[0], o.range[1]), o.order));
  };
}

// First values of base_weight, spline_weight, spline_scaler (spec/kan.md, section 3).
struct KanInit { Initializer base, spline, scaler; };

KanInit init_of(const KanOptions& o, int64_t in, int64_t out, double gain) {
  const double xavier = gain * std::sqrt(6.0 / static_cast<double>(in + out));  // Glorot & Bengio 2010
  const double fan = 1.0 / std::sqrt(static_cast<double>(in));  // also Kaiming's uniform bound with a = sqrt 5
  if (o.init == "paper") return {uniform(-xavier, xavier), normal(0.1 * gain), constant(1.0)};
  if (o.init == "pykan") return {uniform(-gain * fan, gain * fan), fitted_noise(o, 0.3 * gain), constant(fan)};
  if (o.init == "efficient")
    return {uniform(-gain * fan, gain * fan), fitted_noise(o, 0.1 * gain), uniform(-fan, fan)};
  return {uniform(-xavier, xavier), fitted_noise(o, 0.1 * gain), constant(1.0)};
}

}  // namespace

KanLayer::KanLayer(const KanOptions& o, int64_t in, int64_t out, double gain, bool masked, const LinearSplit& split)
    : split_(split), order_(o.order) {
  const Shard& edges = split.shard;
  const Shard grids = edges.dim == 1 ? Shard{0, edges.ranges} : Shard{};
  const KanInit init = init_of(o, in, out, gain);
  if (o.base) base_weight_ = parameter("base_weight", {out, in}, init.base, {}, edges);
  spline_weight_ = parameter("spline_weight", {out, in, o.grid + o.order}, init.spline, {}, edges);
  spline_scaler_ = parameter("spline_scaler", {out, in}, init.scaler, {.decay = false}, edges);
  const auto knots = [o](Tensor& value, uint64_t) {
    copy_(value, kernels::uniform_knots(value.size(0), o.grid, o.order, o.range[0], o.range[1]));
  };
  grid_ = parameter("grid", {in, o.grid + 2 * o.order + 1}, knots,
                    {.decay = false, .keep_fp32 = true, .trainable = false}, grids);
  if (masked) mask_ = parameter("mask", {out, in}, constant(1.0), {.decay = false, .trainable = false}, edges);
}

Variable KanLayer::forward(const Variable& x) const {
  if (split_.shard.ranges.empty()) return kan(x, edge_functions());
  if (split_.shard.dim == 1) return reduce_from_group(kan(x, edge_functions()), split_.group);
  return kan(copy_to_group(x, split_.group), edge_functions());
}

KanVariables KanLayer::edge_functions() const {
  const auto masked = [&](const Parameter& p) { return mask_.defined() ? p.variable() * mask_.variable() : p.variable(); };
  KanVariables v;
  if (base_weight_.defined()) v.base = masked(base_weight_);
  v.spline = spline_weight_;
  v.scaler = masked(spline_scaler_);
  v.grid = grid_.variable().data();
  v.order = order_;
  return v;
}

Variable KanLayer::weight_norms() const { return mean(abs(spline_weight_), -1); }

double KanLayer::forward_flops() const {
  const auto edges = static_cast<double>(spline_scaler_.shape().numel());
  return 2.0 * edges * static_cast<double>(order_ + (base_weight_.defined() ? 2 : 1));
}

Variable kan_penalty(const Variable& edges, double l1, double entropy) {
  constexpr double kTiny = 1e-30;  // an edge of norm 0 counts 0, also where all are
  const Variable total = sum(edges);
  const Variable p = edges / (total + kTiny);
  return total * l1 - sum(p * log(p + kTiny)) * entropy;
}

namespace {
Owned owned_units(int64_t hidden, const LayerContext& context) {
  return owned(context.parallel.tensor, hidden, "model.mlp.hidden", "hidden units");
}
}  // namespace

KanMlp::KanMlp(const KanOptions& o, bool squash, int64_t hidden, const LayerContext& context)
    : squash_(squash), middle_(0.5 * (o.range[0] + o.range[1])), half_(0.5 * (o.range[1] - o.range[0])),
      fc_(child<KanLayer>("fc", o, context.d_model, hidden, 1.0, false,
                          LinearSplit{context.parallel.tensor, owned_units(hidden, context).rows()})),
      proj_(child<KanLayer>("proj", o, hidden, context.d_model,
                            context.residual_std > 0 ? context.residual_std / context.init_std : 1.0, false,
                            LinearSplit{context.parallel.tensor, owned_units(hidden, context).columns()})) {}

Variable KanMlp::squashed(const Variable& x) const { return squash_ ? tanh(x) * half_ + middle_ : x; }

Variable KanMlp::forward(const Variable& x) { return proj_->forward(squashed(fc_->forward(squashed(x)))); }

LayerKind kan_kind() {
  return {"kan", [](ConfigNode& section, const ModelConfig&) { read_kan_network_config(section); },
          [](ConfigNode, const LayerContext&) -> std::shared_ptr<Mixer> {
            throw_error("kan is a network of its own, not a layer that mixes along a sequence; use mlp: {type: kan}");
          }};
}

}  // namespace krait::layers

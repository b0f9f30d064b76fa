#include "layers/kan_network.h"

#include <algorithm>

#include "autograd/elementwise.h"
#include "autograd/shape.h"
#include "kernels/elementwise.h"
#include "kernels/kan_fit.h"

namespace krait::layers {

namespace {

std::string name_of_parameter(size_t layer, const std::string& name) { return fmt::format("layers.{}.{}", layer, name); }

Tensor host(const Tensor& t) { return t.cpu().to(DType::f64); }

// The config with other options under model.kan.
template <class Edit>
ModelConfig edited(const ModelConfig& config, Edit edit) {
  ModelConfig c = config;
  ConfigNode* kan = c.section.find("kan");
  KRAIT_ASSERT(kan, "model.kan was not read");
  edit(*kan);
  return c;
}

std::map<std::string, Tensor> values_of(const ParameterStore& store) {
  std::map<std::string, Tensor> values;
  for (const auto& [name, value] : store.named_masters()) values[name] = host(value).clone();
  return values;
}

}  // namespace

KanNetwork::KanNetwork(const ModelConfig& config, const ModelShape& shape, const CrossEntropyOptions& loss)
    : config_(config), loss_options_(loss), regressor_(config.type == "regressor") {
  ConfigNode section = config.options_of("kan");
  options_ = read_kan_network_config(section);
  KRAIT_CHECK(shape.vocab_size == 0 && shape.input_features > 0,
              "a KAN network needs inputs of a fixed number of features; the data have {}",
              shape.vocab_size > 0 ? "tokens" : "none");
  KRAIT_CHECK(config.n_classes > 0, "{}: model.n_classes is not set", config.type);
  std::vector<int64_t> widths{shape.input_features};
  widths.insert(widths.end(), options_.widths.begin(), options_.widths.end());
  widths.push_back(config.n_classes);
  for (size_t l = 0; l + 1 < widths.size(); ++l)
    layers_.push_back(
        child<KanLayer>(fmt::format("layers.{}", l), options_, widths[l], widths[l + 1], 1.0,
                                     options_.masked || options_.prune.step > 0));
}

Variable KanNetwork::rows_of(const ModelInput& input) const {
  const Tensor& x = input.inputs;
  const int64_t features = layers_.front()->inputs();
  const bool fits = x.defined() && x.size(-1) == features && (x.ndim() == 2 || (x.ndim() == 3 && x.size(1) == 1));
  KRAIT_CHECK(fits, "KAN network: inputs are {}, expected (batch, {}) or (batch, 1, {})",
              x.defined() ? describe(x) : "not there", features, features);
  // Inputs come in fp32 whatever the model computes in.
  const Tensor rows = x.reshape({x.size(0), features});
  return Variable(rows.to(layers_.front()->dtype()));
}

Variable KanNetwork::forward(const ModelInput& input, Variable* penalty) const {
  const auto& r = options_.regularization;
  Variable h = rows_of(input), total;
  for (const auto& layer : layers_) {
    if (penalty && r.lambda > 0) {
      const Variable norms = r.reg == "weights" ? layer->weight_norms() : layer->edges(h);
      const Variable part = kan_penalty(cast(norms, accum_dtype(norms.dtype())), r.l1, r.entropy);
      total = total.defined() ? total + part : part;
    }
    h = layer->forward(h);
  }
  if (total.defined()) *penalty = total * r.lambda;
  return h;
}

ModelLoss KanNetwork::loss(const ModelInput& input, const Tensor& target_count) {
  Variable penalty;
  const Variable y = forward(input, &penalty);
  ModelLoss out = answer_loss(y, input.targets, regressor_, target_count, loss_options_, penalty);
  if (!penalty.defined()) return out;
  out.auxiliary = penalty.data();
  if (target_count.defined())
    out.auxiliary = kernels::div(kernels::mul(out.auxiliary, out.count), target_count.to(out.count.dtype()));
  return out;
}

std::vector<Tensor> KanNetwork::layer_inputs(const ModelInput& samples) const {
  const NoGrad guard;
  Variable h = rows_of(samples);
  std::vector<Tensor> inputs;
  for (const auto& layer : layers_) {
    inputs.push_back(h.data());
    h = layer->forward(h);
  }
  return inputs;
}

std::string KanNetwork::before_step(int64_t step, const ModelInput& samples, ParameterStore& store) {
  if (grids_due(step)) update_grids(samples, store);
  return pruning_due(step) ? mask_weak(samples, store) : "";
}

void KanNetwork::update_grids(const ModelInput& samples, ParameterStore& store) {
  const NoGrad guard;
  Variable h = rows_of(samples);
  for (size_t l = 0; l < layers_.size(); ++l) {
    Tensor grid = store.named_master(name_of_parameter(l, "grid"));
    Tensor spline = store.named_master(name_of_parameter(l, "spline_weight"));
    const Tensor knots = kernels::knots_from_samples(h.data(), options_.grid, options_.order, options_.grid_eps);
    const Tensor fitted = kernels::refit_splines(h.data(), spline, grid, knots, options_.order);
    copy_(grid, knots);
    copy_(spline, fitted);
    store.refresh_compute();
    h = layers_[l]->forward(h);
  }
}

Resized KanNetwork::resize(int64_t step, const ModelInput& samples, const ParameterStore& store) {
  return with_grid(options_.grid_at(step), samples, store);
}

Resized KanNetwork::with_grid(int64_t intervals, const ModelInput& samples, const ParameterStore& store) const {
  Resized out;
  out.config = edited(config_, [&](ConfigNode& kan) { kan.set("grid", ConfigNode::of(intervals)); });
  out.parameters = values_of(store);
  const std::vector<Tensor> inputs = layer_inputs(samples);
  for (size_t l = 0; l < layers_.size(); ++l) {
    Tensor &grid = out.parameters[name_of_parameter(l, "grid")],
           &spline = out.parameters[name_of_parameter(l, "spline_weight")];
    const Tensor knots = kernels::resized_knots(grid, options_.order, intervals);
    spline = kernels::refit_splines(inputs[l], spline, grid, knots, options_.order);
    grid = knots;
    out.reset.push_back(name_of_parameter(l, "spline_weight"));
  }
  return out;
}

KanNetwork::Kept KanNetwork::strong_part(const ModelInput& samples) const {
  const NoGrad guard;
  const std::vector<Tensor> inputs = layer_inputs(samples);
  std::vector<Tensor> norms;
  for (size_t l = 0; l < layers_.size(); ++l) norms.push_back(host(layers_[l]->edges(Variable(inputs[l])).data()));

  Kept out;
  const auto all = [](int64_t n) { return arange(n, DType::i64, kCpu).to_vector<int64_t>(); };
  out.nodes.push_back(all(layers_.front()->inputs()));
  for (size_t l = 0; l + 1 < layers_.size(); ++l) {
    const int64_t before = layers_[l]->inputs(), width = layers_[l]->outputs(), after = layers_[l + 1]->outputs();
    std::vector<int64_t> kept;
    for (int64_t j = 0; j < width; ++j) {
      double incoming = 0, outgoing = 0;
      for (int64_t i = 0; i < before; ++i) incoming = std::max(incoming, norms[l].data<double>()[j * before + i]);
      for (int64_t o = 0; o < after; ++o) outgoing = std::max(outgoing, norms[l + 1].data<double>()[o * width + j]);
      if (incoming > options_.prune.node && outgoing > options_.prune.node) kept.push_back(j);
    }
    KRAIT_CHECK(!kept.empty(), "pruning would leave no node in hidden layer {}; lower model.kan.prune.node ({})", l + 1,
                options_.prune.node);
    out.nodes.push_back(kept);
  }
  out.nodes.push_back(all(layers_.back()->outputs()));
  for (size_t l = 0; l < layers_.size(); ++l) {
    const int64_t before = layers_[l]->inputs();
    Tensor mask = zeros({layers_[l]->outputs(), before}, DType::f64, kCpu);
    for (const int64_t o : out.nodes[l + 1])
      for (const int64_t i : out.nodes[l])
        mask.data<double>()[o * before + i] = norms[l].data<double>()[o * before + i] > options_.prune.edge ? 1 : 0;
    out.masks.push_back(mask);
  }
  return out;
}

std::string KanNetwork::mask_weak(const ModelInput& samples, ParameterStore& store) const {
  const Kept kept = strong_part(samples);
  int64_t edges = 0, of_edges = 0, nodes = 0, of_nodes = 0;
  for (size_t l = 0; l < layers_.size(); ++l) {
    Tensor mask = store.named_master(name_of_parameter(l, "mask"));
    const std::vector<double> before = host(mask).to_vector<double>(), strong = kept.masks[l].to_vector<double>();
    std::vector<double> both(before.size());
    for (size_t i = 0; i < both.size(); ++i) {
      both[i] = before[i] * strong[i];  // what was pruned earlier stays so
      edges += both[i] != 0;
    }
    copy_(mask, from_vector(both).view(mask.shape()).to(mask.dtype()).to(mask.device()));
    of_edges += static_cast<int64_t>(both.size());
    if (l == 0) continue;
    nodes += static_cast<int64_t>(kept.nodes[l].size());
    of_nodes += layers_[l]->inputs();
  }
  store.refresh_compute();
  return fmt::format("pruned: {} of {} edges and {} of {} hidden nodes stay", edges, of_edges, nodes, of_nodes);
}

KanNetwork::Pruned KanNetwork::prune(const ModelInput& samples, const ParameterStore& store) const {
  const NoGrad guard;
  Kept kept = strong_part(samples);
  Pruned out;
  out.nodes = std::move(kept.nodes);
  out.masks = std::move(kept.masks);
  out.network.parameters = values_of(store);
  for (size_t l = 0; l < layers_.size(); ++l) {
    const Tensor& mask = out.masks[l];
    const Variable outputs_kept{from_vector(out.nodes[l + 1])}, inputs_kept{from_vector(out.nodes[l])};
    const auto slice = [&](const std::string& name, bool has_outputs) {
      const auto it = out.network.parameters.find(name_of_parameter(l, name));
      if (it == out.network.parameters.end()) return;
      Variable v(it->second);
      if (has_outputs) v = index_select(v, 0, outputs_kept.data());
      it->second = index_select(v, has_outputs ? 1 : 0, inputs_kept.data()).data();
      if (name == "base_weight" || name == "spline_scaler")
        it->second = mul(Variable(it->second), Variable(out.network.parameters[name_of_parameter(l, "mask")])).data();
    };
    out.network.parameters[name_of_parameter(l, "mask")] = mask;
    slice("mask", true);
    for (const char* name : {"base_weight", "spline_scaler", "spline_weight"}) slice(name, true);
    slice("grid", false);
  }
  out.network.config = edited(config_, [&](ConfigNode& kan) {
    ConfigNode widths = ConfigNode::list();
    for (size_t l = 1; l + 1 < out.nodes.size(); ++l)
      widths.append(ConfigNode::of(static_cast<int64_t>(out.nodes[l].size())));
    kan.set("widths", std::move(widths));
    kan.set("masked", ConfigNode::of(true));
  });
  for (const auto& [name, value] : out.network.parameters) out.network.reset.push_back(name);
  return out;
}

double KanNetwork::train_flops_per_token(int64_t) const {
  double forward = 0;
  for (const auto& layer : layers_) forward += layer->forward_flops();
  return 3 * forward;
}

std::vector<std::string> KanNetwork::kernel_lines(int64_t, int64_t, DType, Device device, bool) const {
  return {device.is_cpu() ? "kan: gathers the k+1 live coefficients of an edge, vectors over outputs"
                          : "kan: bases made in shared memory tiles of one fused product"};
}

}  // namespace krait::layers

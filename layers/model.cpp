#include "layers/model.h"

#include "layers/kan_network.h"

namespace krait::layers {

double Model::train_flops_per_token(int64_t context) const {
  int64_t matrices = tied_head_parameters();
  for (const NamedParameter& p : parameters())
    if (p.data->shape.ndim() >= 2 && p.data->options.decay && !p.data->options.embedding)
      matrices += p.data->shape.numel();
  return 6.0 * static_cast<double>(matrices) + 3.0 * extra_flops_per_token(context);
}

void Model::set_recompute(bool on) {
  if (on) throw ConfigError("train.recompute: this model has no blocks that could be computed again; use recompute: none");
}

Resized Model::resize(int64_t, const ModelInput&, const ParameterStore&) {
  throw_error("this model does not change its shapes");
}

ModelConfig config_at_step(const ModelConfig& config, int64_t step) {
  if (config.layers != std::vector<std::string>{"kan"}) return config;
  ModelConfig c = config;
  ConfigNode& kan = *c.section.find("kan");
  kan.set("grid", ConfigNode::of(read_kan_network_config(kan).grid_at(step)));
  return c;
}

void set_masters(ParameterStore& store, const std::map<std::string, Tensor>& values) {
  for (auto& [name, target, whole, shard] : store.parts(store.master())) {
    const auto it = values.find(name);
    KRAIT_CHECK(it != values.end(), "there is no value for parameter {}", name);
    KRAIT_CHECK(it->second.shape() == whole, "parameter {} is {}, its value {}", name, whole, it->second.shape());
    copy_(target, local_values(it->second, shard));
  }
  store.refresh_compute();
}

ModelInput slice_sequence(const ModelInput& whole, const comm::ProcessGroup& group) {
  if (group.size() == 1) return whole;
  ModelInput piece = whole;
  const int64_t length = (whole.tokens.defined() ? whole.tokens : whole.inputs).size(1), l = length / group.size();
  KRAIT_CHECK(length % group.size() == 0, "sequences of {} positions do not split over {} ranks; set data.context to a "
              "multiple of parallelism.sequence", length, group.size());
  const auto cut = [&](Tensor& t) {
    if (t.defined()) t = t.slice(1, group.rank() * l, (group.rank() + 1) * l).contiguous();
  };
  for (Tensor* t : {&piece.tokens, &piece.inputs, &piece.info.segments, &piece.info.positions}) cut(*t);
  const bool by_position = whole.targets.defined() && whole.targets.ndim() == 2 && whole.targets.dtype() == DType::i64;
  if (by_position) cut(piece.targets);
  return piece;
}

Variable Model::predict(const ModelInput&) {
  throw_error("this model answers for each token, not for each sequence; set model.type: classifier or regressor");
}

namespace {

std::unique_ptr<Model> made(const ModelConfig& config, const ModelShape& shape, const CrossEntropyOptions& loss,
                            const Parallel& parallel) {
  std::unique_ptr<Model> model;
  if (config.type == "language_model")
    model = std::make_unique<LanguageModel>(config, shape, loss, parallel);
  else if (config.layers == std::vector<std::string>{"kan"}) {
    KRAIT_CHECK(parallel.sequence->size() == 1, "kan has no sequences that could be spread over {} ranks; set "
                "parallelism.sequence: 1", parallel.sequence->size());
    model = std::make_unique<KanNetwork>(config, shape, loss);  // small: whole on every process of a tensor group
  } else
    model = std::make_unique<SequenceModel>(config, shape, loss, parallel);
  model->set_primary(parallel.tensor->rank() == 0);
  return model;
}

}  // namespace

std::unique_ptr<Model> make_model(const ModelConfig& config, const ModelShape& shape, const CrossEntropyOptions& loss,
                                  const Parallel& parallel) {
  try {
    return made(config, shape, loss, parallel);
  } catch (const Error& e) {  // layers refuse sizes; what they name is the config's
    throw ConfigError(e.what());
  }
}

}  // namespace krait::layers

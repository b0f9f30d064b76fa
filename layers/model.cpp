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
  KRAIT_CHECK(!on, "train.recompute: this model has no blocks that could be computed again; use recompute: none");
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

Variable Model::predict(const ModelInput&) {
  throw_error("this model answers for each token, not for each sequence; set model.type: classifier or regressor");
}

std::unique_ptr<Model> make_model(const ModelConfig& config, const ModelShape& shape, const CrossEntropyOptions& loss,
                                  const Parallel& parallel) {
  std::unique_ptr<Model> model;
  if (config.type == "language_model")
    model = std::make_unique<LanguageModel>(config, shape, loss, parallel);
  else if (config.layers == std::vector<std::string>{"kan"})
    model = std::make_unique<KanNetwork>(config, shape);  // small: whole on every process of a tensor group
  else
    model = std::make_unique<SequenceModel>(config, shape, parallel);
  model->set_primary(parallel.tensor->rank() == 0);
  return model;
}

}  // namespace krait::layers

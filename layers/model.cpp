#include "layers/model.h"

namespace krait::layers {

double Model::train_flops_per_token(int64_t context) {
  int64_t matrices = tied_head_parameters();
  for (const NamedParameter& p : parameters())
    if (p.data->shape.ndim() >= 2 && p.data->options.decay && !p.data->options.embedding)
      matrices += p.data->shape.numel();
  return 6.0 * static_cast<double>(matrices) + 3.0 * decoder().extra_flops_per_token(context);
}

Variable Model::predict(const ModelInput&) {
  throw_error("this model answers for each token, not for each sequence; set model.type: classifier or regressor");
}

std::unique_ptr<Model> make_model(const ModelConfig& config, const ModelShape& shape, const CrossEntropyOptions& loss) {
  if (config.type == "language_model") return std::make_unique<LanguageModel>(config, shape, loss);
  return std::make_unique<SequenceModel>(config, shape);
}

}  // namespace krait::layers

#include "layers/registry.h"

#include "layers/attention.h"

namespace krait::layers {

namespace {

using Maker = std::shared_ptr<Mixer> (*)(ConfigNode options, const LayerContext&);

/// A layer family adds one line here and one to layer_kinds().
const std::vector<std::pair<std::string, Maker>>& makers() {
  static const std::vector<std::pair<std::string, Maker>> all{
      {"attention", [](ConfigNode options, const LayerContext& context) -> std::shared_ptr<Mixer> {
         return std::make_shared<Attention>(read_attention_config(options, context.d_model, context.dropout),
                                            context);
       }},
  };
  return all;
}

}  // namespace

std::shared_ptr<Mixer> make_mixer(const std::string& kind, const ConfigNode& options, const LayerContext& context) {
  for (const auto& [name, make] : makers())
    if (name == kind) return make(options, context);
  throw_error(fmt::format("layer kind '{}' has options but no implementation", kind));
}

}  // namespace krait::layers

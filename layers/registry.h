#pragma once
#include <memory>
#include <string>
#include <vector>

#include "core/config_node.h"
#include "layers/layer_context.h"
#include "layers/mixer.h"
#include "layers/model_config.h"

namespace krait::layers {

/// A kind of layer that `model.layers` may name. Each family declares its own: `LayerKind mamba_kind();`.
struct LayerKind {
  std::string name;
  /// Reads and completes the options under the kind's name; throws ConfigError. Of the model, what is read before
  /// the layers: d_model, n_layers, dropout.
  void (*read_options)(ConfigNode& section, const ModelConfig& model);
  /// Builds the mixer from complete options.
  std::shared_ptr<Mixer> (*make)(ConfigNode options, const LayerContext& context);
};

/// All kinds: one line for each family in registry.cpp.
const std::vector<LayerKind>& layer_kinds();

/// Builds the mixer that a config names in model.layers from its own options.
std::shared_ptr<Mixer> make_mixer(const std::string& kind, const ConfigNode& options, const LayerContext& context);

}  // namespace krait::layers

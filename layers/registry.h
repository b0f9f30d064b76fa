#pragma once
#include <memory>
#include <string>

#include "core/config_node.h"
#include "layers/layer_context.h"
#include "layers/mixer.h"

namespace krait::layers {

/// Builds the mixer that a config names in model.layers from its own options (see layer_kinds()).
std::shared_ptr<Mixer> make_mixer(const std::string& kind, const ConfigNode& options, const LayerContext& context);

}  // namespace krait::layers

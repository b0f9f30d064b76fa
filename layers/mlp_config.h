#pragma once
#include <string>

#include "layers/kan_config.h"
#include "layers/moe_config.h"

namespace krait::layers {

/// Options of the feed-forward part of a block.
struct MlpConfig {
  std::string type = "gelu";  // none | gelu | gelu_tanh | relu2 | silu | swiglu | gelu_gated | kan | moe
  double ratio = 0;           // hidden width / d_model; 0: 4, or 8/3 in multiples of 128 for swiglu, gelu_gated, moe;
                              // kan: as many parameters as gelu
  int64_t hidden = 0;         // hidden width, instead of ratio
  bool bias = false;
  // type kan, in the same section: two KAN layers
  KanOptions kan;
  bool squash = true;  // kan: tanh keeps the inputs of both layers in the grid's range
  MoeConfig moe;       // type moe, in the same section
};

/// Throws ConfigError with the place of the option at fault; completes the section.
MlpConfig read_mlp_config(ConfigNode& section, int64_t d_model);

}  // namespace krait::layers

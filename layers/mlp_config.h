#pragma once
#include <string>

#include "core/option_reader.h"

namespace krait::layers {

/// Options of the feed-forward part of a block.
struct MlpConfig {
  std::string type = "gelu";  // none | gelu | gelu_tanh | relu2 | silu | swiglu | gelu_gated
  double ratio = 0;           // hidden width / d_model; 0: 4, or 8/3 in multiples of 128 for swiglu, gelu_gated
  int64_t hidden = 0;         // hidden width, instead of ratio
  bool bias = false;
};

/// Throws ConfigError with the place of the option at fault; completes the section.
MlpConfig read_mlp_config(ConfigNode& section, int64_t d_model);

}  // namespace krait::layers

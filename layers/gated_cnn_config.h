#pragma once
#include "core/option_reader.h"

namespace krait::layers {

/// Options of the layer kind `gated_cnn`.
struct GatedCnnConfig {
  double expand = 0;      // inner width over d_model; 0: 8/3, rounded down
  int64_t hidden = 0;     // inner width, instead of expand
  double conv_ratio = 1;  // convolved channels over d_model
  int64_t d_conv = 7;     // taps of the convolution

  int64_t conv_channels = 0;  // derived; at most hidden
};

/// Throws ConfigError with the place of the option at fault; completes the section.
GatedCnnConfig read_gated_cnn_config(ConfigNode& section, int64_t d_model);

}  // namespace krait::layers

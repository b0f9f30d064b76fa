#pragma once
#include "core/option_reader.h"

namespace krait::layers {

/// Options of the layer kind `mamba`.
struct MambaConfig {
  int64_t d_state = 16;  // states per channel
  int64_t expand = 2;    // inner width over d_model
  int64_t d_conv = 4;    // width of the convolution
  int64_t dt_rank = 0;   // of the projection of the time step; 0 or auto: ceil(d_model / 16)
  double dt_min = 0.001, dt_max = 0.1;  // time steps at the start of training
  double dt_init_floor = 1e-4;          // and their smallest value
  bool conv_bias = true;
  bool bias = false;     // of the projections in and out
  int64_t d_inner = 0;   // derived: expand d_model
};

/// Throws ConfigError with the place of the option at fault; completes the section.
MambaConfig read_mamba_config(ConfigNode& section, int64_t d_model);

}  // namespace krait::layers

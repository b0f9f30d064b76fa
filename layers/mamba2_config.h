#pragma once
#include <array>

#include "core/option_reader.h"

namespace krait::layers {

/// Options of the layer kind `mamba2`.
struct Mamba2Config {
  int64_t d_state = 128;     // n: columns of a head's state
  int64_t head_dim = 64;     // p: rows of a head's state
  int64_t expand = 2;        // inner width over d_model
  int64_t n_groups = 1;      // sets of B and C, each shared by heads / n_groups heads
  int64_t d_conv = 4;        // taps of the convolution
  int64_t chunk_size = 256;  // positions per chunk; changes speed and memory, not results
  double dt_min = 0.001, dt_max = 0.1;           // range of the time step at the start of training
  std::array<double, 2> dt_limit{0.0, 0.0};      // clamp of the time step; [0, 0]: none
  std::array<double, 2> A_init_range{1.0, 16.0};  // of -A at the start of training
  bool D_has_hdim = false;        // one D per channel instead of per head
  bool norm_before_gate = false;  // RMSNorm(y) silu(z) instead of RMSNorm(y silu(z))
  bool bias = false;              // of the projections
  bool conv_bias = true;

  int64_t inner = 0, heads = 0;  // derived
};

/// Throws ConfigError with the place of the option at fault; completes the section.
Mamba2Config read_mamba2_config(ConfigNode& section, int64_t d_model);

}  // namespace krait::layers

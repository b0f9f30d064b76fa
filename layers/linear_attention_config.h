#pragma once
#include <string>

#include "core/option_reader.h"

namespace krait::layers {

/// Options of the layer kind `linear_attention`.
struct LinearAttentionConfig {
  int64_t n_heads = 0;           // 0: heads of 64 channels
  std::string feature = "elu1";  // elu1: normalised | identity: not normalised, queries scaled by head_dim^-1/2
  bool gate = false;             // a decay per head and position, from the input
  double eps = 1e-6;             // added to elu1's divisor
  int64_t chunk_size = 64;       // positions per chunk; changes speed and memory, not results
  bool bias = false;             // of the projections

  int64_t head_dim = 0;  // derived
};

/// Throws ConfigError with the place of the option at fault; completes the section.
LinearAttentionConfig read_linear_attention_config(ConfigNode& section, int64_t d_model);

}  // namespace krait::layers

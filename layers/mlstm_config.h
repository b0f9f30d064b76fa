#pragma once
#include <string>

#include "core/option_reader.h"

namespace krait::layers {

/// Options of the layer kind `mlstm`. What is 0 in the YAML is filled in by the reader.
struct MlstmConfig {
  int64_t n_heads = 4;
  double proj_factor = 2;            // inner width / d_model, rounded up to a multiple of 64
  int64_t inner = 0;                 // inner width, instead of proj_factor
  int64_t conv = 4;                  // taps of the causal convolution
  int64_t qkv_block_size = 4;        // of the block-diagonal maps to q, k and v
  int64_t chunk_size = 64;           // of the chunkwise form on the CPU
  bool denominator_gradient = true;  // false: h's denominator is a constant in the backward, as in public kernels
  double eps = 1e-6;                 // of the cell's denominator
  double norm_eps = 1e-5;            // of the norm of each head
};

/// Options of the layer kind `mlstm_large`.
struct MlstmLargeConfig {
  int64_t n_heads = 8;
  double qk_factor = 0.5;            // width of q and of k / d_model
  double gate_cap = 15;              // gates are cap tanh(x / cap)
  double input_gate_bias = -10;      // at the start, before the cap
  int64_t chunk_size = 64;
  bool denominator_gradient = true;
  double eps = 1e-6;
  double norm_eps = 1e-6;
  int64_t qk_width = 0;              // derived: qk_factor d_model
};

/// Both throw ConfigError with the place of the option at fault, and complete the section.
MlstmConfig read_mlstm_config(ConfigNode& section, int64_t d_model);
MlstmLargeConfig read_mlstm_large_config(ConfigNode& section, int64_t d_model);

}  // namespace krait::layers

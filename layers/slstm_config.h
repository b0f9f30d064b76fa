#pragma once
#include <string>

#include "core/option_reader.h"

namespace krait::layers {

/// Options of the layer kind `slstm`.
struct SlstmConfig {
  int64_t n_heads = 4;
  int64_t conv = 4;                      // width of the causal convolution in front of the i and f gates; 0: none
  std::string recurrent_init = "zeros";  // of R: zeros | standard: uniform within 1 / sqrt(d_model)
  std::string forget_gate = "sigmoid";   // sigmoid | exp
  double ratio = 1.3;                    // hidden width of the gated feed-forward / d_model, up to a multiple of 64; 0: none
  int64_t hidden = 0;                    // hidden width, instead of ratio; 0: from ratio
};

/// Throws ConfigError with the place of the option at fault; completes the section.
SlstmConfig read_slstm_config(ConfigNode& section, int64_t d_model);

}  // namespace krait::layers

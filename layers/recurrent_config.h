#pragma once
#include "core/option_reader.h"

namespace krait::layers {

/// Options of the layer kinds `rnn`, `lstm` and `gru`.
struct RecurrentConfig {
  int64_t hidden = 0;      // width of the state; default: d_model. Another width adds an output projection
  double forget_bias = 0;  // lstm: added to the initial bias of the forget gate
};

/// `lstm`: the section may set forget_bias.
RecurrentConfig read_recurrent_config(ConfigNode& section, int64_t d_model, bool lstm);

}  // namespace krait::layers

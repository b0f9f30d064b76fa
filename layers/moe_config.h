#pragma once
#include "core/option_reader.h"

namespace krait::layers {

/// Options of the mlp type `moe`, in the section `mlp` beside ratio or hidden (of one expert).
struct MoeConfig {
  int64_t n_experts = 8;
  int64_t top_k = 2;           // experts per token
  int64_t n_null_experts = 0;  // slots that a token may choose to do nothing
  bool renormalize = true;     // the chosen experts' weights add up to 1
  double balance_coef = 1e-2;  // of the load-balance loss
  double z_coef = 1e-3;        // of the router's z-loss
};
void read_moe_options(OptionReader& options, MoeConfig& c);

}  // namespace krait::layers

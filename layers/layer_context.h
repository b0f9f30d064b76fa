#pragma once
#include <cstdint>
#include <string>

#include "core/comm/process_group.h"

namespace krait::layers {

/// The groups of processes that work on one model together: `tensor` splits heads, channels and hidden units,
/// `sequence` the positions.
struct Parallel {
  comm::GroupPtr tensor = comm::single_group("tensor");
  comm::GroupPtr sequence = comm::single_group("sequence");
};

/// What every layer of a model shares; filled from the model section of a config.
struct LayerContext {
  int64_t d_model = 0;
  int64_t n_layers = 1;
  int64_t layer_index = 0;
  int64_t n_branches = 1;     // of the residual stream over the whole stack: n_layers, or twice that with an mlp
  int64_t context = 0;        // training length in tokens
  double init_std = 0.02;     // of weight matrices
  double residual_std = 0.0;  // of matrices that write into the residual stream (ModelConfig::residual_std)
  double norm_eps = 1e-5;
  bool post_norm = false;     // norm(x + f(x)) instead of x + f(norm(x))
  double dropout = 0.0;       // on what a layer adds to the residual stream
  Parallel parallel;
  /// A name of random streams that no other layer uses: "layers.3.<what>".
  std::string stream(const std::string& what) const { return "layers." + std::to_string(layer_index) + "." + what; }
};

}  // namespace krait::layers

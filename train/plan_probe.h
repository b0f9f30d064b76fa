#pragma once
#include <map>
#include <string>

#include "layers/model.h"
#include "train/config.h"

namespace krait::train {

/// Collectives of one group in a forward and a backward pass.
struct Traffic {
  double calls = 0;
  double bytes = 0;  // that one rank sends, by the ring algorithms of spec/parallel.md
};

/// What a part of a model costs for each token of a micro-batch, as a run of it on the CPU shows.
struct PassCost {
  double saved_bytes = 0;      // held from the forward to the backward pass
  double transient_bytes = 0;  // on top of them, at the worst moment of the backward pass
  double saved_per_sequence = 0;  // of each sequence, whatever its length, held as long: states between members of a sequence group
  std::map<std::string, Traffic> traffic;  // by group: "tensor", "sequence"
};

/// What grows with the number of layers of a kind (its block with norms and mlp) and what does not.
struct ModelCost {
  std::map<std::string, PassCost> per_layer;  // by kind
  PassCost rest;                              // embedding, last norm, head without logits
};

/// Runs two and three layers of every kind at two short lengths, with the widths of the config, and takes the slopes; the
/// first layer is not like the others, whose residual stream is a sum of its own. Memory is a GPU's (core/memory_probe.h).
/// The ranks of `tensor` and `sequence` are simulated: what they would send is counted, not sent.
ModelCost probe_model(const Config& config, const layers::ModelShape& shape, int64_t tensor, int64_t sequence);

/// Groups of which only one rank is there, the first of the tensor group and the last of the sequence group (which has
/// states before its piece): collectives fill what they receive with zeros and count what they would send. The traffic must
/// outlive them.
layers::Parallel simulated_parallel(int64_t tensor, int64_t sequence, Traffic* of_tensor, Traffic* of_sequence);

}  // namespace krait::train

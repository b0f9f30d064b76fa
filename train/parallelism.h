#pragma once
#include "core/comm/process_group.h"
#include "train/config.h"
#include "train/launcher.h"

namespace krait::train {

/// Ranks along each axis.
struct MeshShape {
  int64_t data = 1, sequence = 1, tensor = 1;
};

/// A network of KAN layers, which changes its own parameters between steps.
bool is_kan_network(const Config& config);

/// parallelism.zero where it is left out. 1 for ranks that share gradients: it sends as much, each rank updates its part
/// alone, and the new values travel under the next forward pass. 0 where that cannot be: strict order, KAN networks.
int64_t default_zero(const Config& config, int64_t replicas);

/// The mesh that section `parallelism` asks for where a launcher started `launch.world_size` ranks. Checks what
/// depends on the ranks and completes train.tokens_per_step and parallelism.zero. ConfigError explains sizes that do not fit.
MeshShape fit_to_ranks(Config& config, const Launch& launch);

/// "mpirun (Open MPI): 4 ranks = data 2 x sequence 1 x tensor 2", for people.
std::string describe(const MeshShape& shape, const Launch& launch);

}  // namespace krait::train

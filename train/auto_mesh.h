#pragma once
#include "train/launcher.h"
#include "train/parallelism.h"
#include "train/plan.h"

namespace krait::train {

/// A way to lay out the ranks, with what `krait plan` predicts of it.
struct MeshCandidate {
  ParallelismConfig mesh;
  std::string refusal;  // why training would refuse it; then nothing is predicted
  double gib = 0;       // that a rank needs
  bool fits = false;
  double step_seconds = 0, exposed_seconds = 0;  // the second: of it communication that nothing hides
  double tokens_per_s = 0;
};

/// parallelism: auto. Every data x sequence x tensor over the ranks (tensor inside a node) at every ZeRO level: of those
/// whose predicted memory leaves kReserve free, the one with the most predicted tokens/s; where several are as fast, the
/// one that splits least.
struct MeshChoice {
  static constexpr double kReserve = 0.05;  // the predictions' error
  std::vector<MeshCandidate> candidates;    // those that fit, fastest first; those that do not, smallest first; refused ones
  bool found() const { return !candidates.empty() && candidates.front().fits; }
  const ParallelismConfig& mesh() const { return candidates.front().mesh; }
};
MeshChoice choose_mesh(const Config& config, const Launch& launch, const Machine& machine);

/// A table of the candidates and why all but the first lose.
std::string explain(const MeshChoice& choice, const Config& config, const Machine& machine);

/// Writes the mesh into the config and its tree.
void use_mesh(Config& config, const ParallelismConfig& mesh);

/// For parallelism: auto, the choice made by the first rank for all of them, who prints it; nothing otherwise.
/// ConfigError when nothing fits. All ranks together.
void settle_mesh(Config& config, const Launch& launch, comm::ProcessGroup& world);

}  // namespace krait::train

#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "train/config.h"
#include "train/machine.h"
#include "train/plan_probe.h"

namespace krait::train {

/// One line of a plan's communication.
struct PlannedTraffic {
  std::string what;     // "gradients, all-reduce"
  std::string group;    // data | tensor | sequence
  double calls = 0;     // per rank and step
  double bytes = 0;     // that one rank sends per step
  double seconds = 0;   // at the rate of the slowest link of the group
  double exposed_seconds = 0;  // not hidden behind computation
};

/// What a training run of a config would take on a number of GPUs; computed, nothing is trained.
struct Plan {
  int64_t ranks = 1, data = 1, tensor = 1, sequence = 1, zero = 0;
  int64_t micro_batches = 1;    // of one rank in a step
  int64_t tokens_per_step = 0;  // of all ranks
  int64_t parameters = 0, parameters_per_rank = 0;
  double flops_per_token = 0;

  struct Bytes {
    double weights = 0, gradients = 0, optimizer = 0, activations = 0, workspace = 0;
    double total() const { return weights + gradients + optimizer + activations + workspace; }
  } memory;  // of one rank, at the peak

  std::vector<PlannedTraffic> traffic;
  double compute_seconds = 0, step_seconds = 0;
  double tokens_per_s = 0;
  double mfu = 0;         // of the machine's reached matrix rate
  double efficiency = 1;  // tokens/s per GPU against one GPU with the same micro-batch
  std::vector<std::string> warnings;
};

/// Plans of one config on any number of meshes; what they share is computed once.
class Planner {
 public:
  Planner(const Config& config, const Machine& machine);
  /// On `ranks` processes; data: -1 takes what is left. ConfigError where the sizes do not fit together.
  Plan plan(const ParallelismConfig& mesh, int64_t ranks);
  const layers::Model& model() const { return *whole_; }
  /// GiB that a rank needs with the context and the libraries, beside what Krait allocates.
  static double needed_gib(const Plan& plan);

 private:
  struct Split {  // what depends on the sizes of the tensor and the sequence group alone
    ModelCost cost;
    int64_t parameters_per_rank = 0;
  };
  const Split& split(int64_t tensor, int64_t sequence);

  Config config_;
  Machine machine_;
  layers::ModelShape shape_;
  std::unique_ptr<layers::Model> whole_;
  std::map<std::pair<int64_t, int64_t>, Split> splits_;
};

/// The mesh is the config's parallelism.
Plan make_plan(const Config& config, int64_t ranks, const Machine& machine);

std::string plan_text(const Plan& plan, const Config& config, const Machine& machine);
std::string plan_json(const Plan& plan, const Machine& machine);

}  // namespace krait::train

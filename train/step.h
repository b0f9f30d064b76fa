#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/allocator.h"
#include "core/stream.h"
#include "train/carried_state.h"
#include "train/gradient_reduction.h"
#include "train/optimizer.h"
#include "train/parameter_gather.h"
#include "train/schedule.h"
#include "train/session.h"

namespace krait::train {

/// How the optimizer treats a parameter: factor of the learning rate (0: frozen) and weight decay.
struct ParameterGroup {
  double lr_scale = 1, weight_decay = 0;
  friend auto operator<=>(const ParameterGroup&, const ParameterGroup&) = default;
};
ParameterGroup group_of(const layers::ParameterOptions& parameter, const OptimizerConfig& config);

/// What one step tells, read from the device.
struct StepReport {
  double loss = 0;       // mean over the step's targets
  double grad_norm = 0;  // before clipping
  bool skipped = false;  // the norm was not finite: the parameters did not change
  std::optional<double> auxiliary = {};  // what else the step minimised (layers::ModelLoss)
};

/// One optimizer step on the job's ranks: forward and backward of every micro-batch, sums over the ranks, clip, update.
/// Data rank d of D has the micro-batches k D + d of the step's, k = 0, 1, ... On a GPU a micro-batch, one that ends
/// with a reduction, and the update are captured into CUDA graphs after a first plain run of each. Nothing in it waits
/// for the device.
class TrainStep {
 public:
  explicit TrainStep(Session& session);
  ~TrainStep();

  /// `batches`: this rank's micro-batches of the step, `step` counting from 0. All ranks together.
  void run(const std::vector<data::Batch>& batches, int64_t step);
  /// Of the last run. Waits for the device. All ranks together.
  StepReport report() const;
  double learning_rate_at(int64_t step) const { return learning_rate(schedule_, step); }
  Optimizer& optimizer() { return *optimizer_; }
  ParameterShards& shards() { return *shards_; }
  /// The model will be used in another way (evaluation), or was. All ranks together.
  void leave_training();
  bool captured() const { return update_graph_ != nullptr; }
  /// What the model changed of itself before the last run, for the log; empty most of the time.
  const std::string& note() const { return note_; }
  /// With data.state: carry, else null.
  CarriedState* carried_state() { return carried_.get(); }

 private:
  void build_optimizer();
  void adapt_model(const data::Batch& batch, int64_t step);
  void count_targets(const std::vector<data::Batch>& batches);
  void fill_inputs(const data::Batch& batch);
  void micro_step(bool first, bool last);
  void run_micro_batch(bool first, bool last);
  void update();
  using Ranges = std::vector<std::pair<int64_t, int64_t>>;
  Tensor squares(const Ranges& ranges, Tensor more = {}) const;
  Tensor sum_squares() const;

  Session& session_;
  ScheduleOptions schedule_;
  std::unique_ptr<ParameterShards> shards_;
  std::unique_ptr<ParameterGather> gather_;       // of ZeRO-3, else null
  std::unique_ptr<GradientReduction> reduction_;  // null where there is nothing to sum
  comm::GroupPtr background_;                     // of the replicas
  bool stale_ = false;                            // the pieces of ZeRO-1 and 2 have been updated and not gathered
  std::unique_ptr<Optimizer> optimizer_;
  Ranges inner_, outer_;               // of the optimizer's gradients, those in the norm: summed early, and with the embedding's buckets
  Tensor inner_squares_;               // of the step under way
  Uploader uploader_;
  std::unique_ptr<CarriedState> carried_;
  layers::ModelInput input_;   // fixed addresses, so that a graph can be replayed on new values
  Tensor target_count_;        // fp32 scalar: counted targets of the step, of all ranks
  Tensor micro_loss_;          // (2): sum over the micro-batch's targets; its share of what else is minimised
  Tensor losses_;              // (n, 2): of every micro-batch of this rank
  bool has_auxiliary_ = false;
  kernels::GradNorm norm_;
  int64_t runs_ = 0;
  std::string note_;
  bool use_graphs_;
  MemoryPool pool_;            // of everything inside the graphs
  /// Of micro-batches: those that gather parameters, the step's first, and that sum gradients, its last, have their own.
  std::unique_ptr<CapturedGraph> micro_graphs_[2][2];
  std::unique_ptr<CapturedGraph> update_graph_;
};

}  // namespace krait::train

#pragma once
#include <memory>
#include <vector>

#include "core/allocator.h"
#include "core/stream.h"
#include "train/carried_state.h"
#include "train/optimizer.h"
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
};

/// One optimizer step: forward and backward of every micro-batch, clip, update. On a GPU the micro-batch and the
/// update are captured into CUDA graphs after a first plain run of each. Nothing in it waits for the device.
class TrainStep {
 public:
  explicit TrainStep(Session& session);
  ~TrainStep();

  /// `batches`: the micro-batches of the step, `step` counting from 0.
  void run(const std::vector<data::Batch>& batches, int64_t step);
  /// Of the last run. Waits for the device.
  StepReport report() const;
  double learning_rate_at(int64_t step) const { return learning_rate(schedule_, step); }
  Optimizer& optimizer() { return *optimizer_; }
  bool captured() const { return micro_graph_ != nullptr; }
  /// With data.state: carry, else null.
  CarriedState* carried_state() { return carried_.get(); }

 private:
  void build_optimizer();
  void adapt_model(const data::Batch& batch, int64_t step);
  void fill_inputs(const data::Batch& batch);
  void micro_step();
  void update();

  Session& session_;
  ScheduleOptions schedule_;
  std::unique_ptr<Optimizer> optimizer_;
  Uploader uploader_;
  std::unique_ptr<CarriedState> carried_;
  layers::ModelInput input_;   // fixed addresses, so that a graph can be replayed on new values
  Tensor target_count_;       // fp32 scalar: counted targets of the step
  Tensor loss_sum_;            // scalar: over the step so far
  kernels::GradNorm norm_;
  int64_t runs_ = 0;
  bool use_graphs_;
  MemoryPool pool_;            // of everything inside the graphs
  std::unique_ptr<CapturedGraph> micro_graph_, update_graph_;
};

}  // namespace krait::train

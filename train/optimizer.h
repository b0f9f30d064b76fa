#pragma once
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/flat_update.h"
#include "kernels/grad_norm.h"

namespace krait::train {

enum class OptimizerType { adamw, sgd, lion };
/// Throws ConfigError with the list of names.
OptimizerType optimizer_type_from_name(std::string_view name);
std::string_view name_of(OptimizerType type);

struct OptimizerOptions {
  OptimizerType type = OptimizerType::adamw;
  double beta1 = 0.9, beta2 = 0.95;  // adamw, lion
  double eps = 1e-8;                 // adamw
  double momentum = 0;               // sgd
  bool nesterov = false;             // sgd
};

/// Numbers of state that an optimizer has for each parameter, in the dtype of the master weights.
int states_per_parameter(OptimizerType type, double momentum);

/// Updates flat parameters in place from flat gradients, in one launch, or two where some go first. Holds views of the
/// buffers it is given (the caller keeps writing gradients into them) and owns its state.
///
/// One step:  optimizer.prepare(lr, step);                                     on the host, outside a graph
///            clip = grad_norm(grad, max_norm, optimizer.skipped_steps());     may be captured from here
///            optimizer.update(clip);
class Optimizer {
 public:
  /// param fp32 or fp64 (n), grad like param or bf16 (n), compute bf16 (n) or undefined; see kernels::FlatUpdate.
  /// `first`: how many elements, up to the end of a segment, are updated before the others.
  Optimizer(const OptimizerOptions& options, Tensor param, Tensor grad, Tensor compute,
            const std::vector<kernels::SegmentSpec>& segments, int64_t first = 0);

  /// Sets the scalars of step = 0, 1, ...; queued on the stream, never waits.
  void prepare(double lr, int64_t step);
  /// Reads nothing from the host. A step with a non-finite norm changes nothing but zeroes the gradients; it
  /// counts as a step of the bias correction. `between` is called when the first elements' update has been queued.
  void update(const kernels::GradNorm& clip = {}, bool zero_grad = true, const std::function<void()>& between = {});
  void step(double lr, int64_t step_index, const kernels::GradNorm& clip = {}, bool zero_grad = true) {
    prepare(lr, step_index);
    update(clip, zero_grad);
  }

  /// int64 (1) on the device: how many updates a non-finite norm has skipped.
  const Tensor& skipped_steps() const { return skipped_; }
  /// What a checkpoint must hold, by name: "optimizer.exp_avg", ... Flat, in parameter order; to restore, copy into.
  std::vector<std::pair<std::string, Tensor>> state() const;
  const OptimizerOptions& options() const { return options_; }

 private:
  struct Part {
    int64_t begin, end;
    kernels::OptimizerSegments segments;
  };
  void update(const Part& part, kernels::FlatUpdate u);

  OptimizerOptions options_;
  kernels::FlatUpdate buffers_;
  std::vector<Part> parts_;
  Tensor exp_avg_, exp_avg_sq_;  // exp_avg_ is the velocity of SGD
  Tensor skipped_;
};

}  // namespace krait::train

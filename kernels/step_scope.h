#pragma once
#include <memory>

#include "core/deferred.h"
#include "core/dispatch.h"

namespace krait::kernels {

/// What a scope has gathered so far.
struct GatheredSteps : Deferred {
  int64_t operations = 0, launches = 0;
};

/// While it lives, this thread's kernels of a decoding step of so many rows are gathered on a GPU that can (bf16, sm_90).
/// Of few rows, what has been gathered runs as one launch: linear maps, norms, mamba_step, mamba2_step, attention_append;
/// of more, or where all layers are such scans, neighbours run as one kernel where there is such. The results are there
/// when anything else of this thread reads them: using the stream ends a launch.
class StepScope {
 public:
  explicit StepScope(Device device, int64_t rows = 1, bool scans = false);
  ~StepScope();
  StepScope(const StepScope&) = delete;
  StepScope& operator=(const StepScope&) = delete;
  /// Queues what is left. Without it the destructor drops that: an exception is on its way.
  void finish();
  /// Whether launches had several operations each, of those finished so far. One by one they are better launched as usual.
  bool pays() const { return steps_ == nullptr || steps_->operations >= 4 * steps_->launches; }

 private:
  std::unique_ptr<GatheredSteps> steps_;
};

/// Null where steps cannot be gathered.
KRAIT_BACKENDS(void gather_steps(std::unique_ptr<GatheredSteps>& steps, Device device, int64_t rows, bool scans))

}  // namespace krait::kernels

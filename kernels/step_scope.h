#pragma once
#include <memory>

#include "core/deferred.h"
#include "core/dispatch.h"

namespace krait::kernels {

/// While it lives, this thread's kernels of a decoding step are gathered on a GPU that can (bf16, few rows, sm_90), and
/// what has been gathered runs as one launch: linear maps, norms, mamba_step, mamba2_step, attention_append. The
/// results are there when anything else of this thread reads them: using the stream ends a launch.
class StepScope {
 public:
  explicit StepScope(Device device);
  ~StepScope();
  StepScope(const StepScope&) = delete;
  StepScope& operator=(const StepScope&) = delete;
  /// Queues what is left. Without it the destructor drops that: an exception is on its way.
  void finish();

 private:
  std::unique_ptr<Deferred> steps_;
};

/// Null where steps cannot be gathered.
KRAIT_BACKENDS(void gather_steps(std::unique_ptr<Deferred>& steps, Device device))

}  // namespace krait::kernels

#pragma once
#include <memory>

#include "core/deferred.h"
#include "core/dispatch.h"

namespace krait::kernels {

/// Kernels of few rows serve so many: their blocks make all of them.
inline constexpr int kFewRows = 8;
/// So many rows of Mamba's and Mamba-2's layers have kernels of their own, for plain states (kernels/mamba2_step.h).
inline constexpr int64_t kFewScanRows = 3;

/// While it lives, this thread's kernels of a decoding step of so many rows are gathered on a GPU that can (bf16, sm_90).
/// Neighbours run as one kernel where there is such: of up to kFewRows rows, norms, linear maps, gated units, attention_append; of
/// more, or with `scans`, where all layers are such, RMSNorm, linear maps, gated units, attention_append, mamba_step,
/// mamba2_step. The results are there when anything else of this thread reads them: using the stream launches what waits.
class StepScope {
 public:
  explicit StepScope(Device device, int64_t rows = 1, bool scans = false);
  ~StepScope();
  StepScope(const StepScope&) = delete;
  StepScope& operator=(const StepScope&) = delete;
  /// Queues what is left. Without it the destructor drops that: an exception is on its way.
  void finish();

 private:
  std::unique_ptr<Deferred> steps_;
};

/// Null where steps cannot be gathered.
KRAIT_BACKENDS(void gather_steps(std::unique_ptr<Deferred>& steps, Device device, int64_t rows, bool scans))

}  // namespace krait::kernels

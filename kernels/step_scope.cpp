#include "kernels/step_scope.h"

#include "core/error.h"

namespace krait::kernels {

StepScope::StepScope(Device device, int64_t rows, bool scans) {
  KRAIT_ASSERT(current_deferred() == nullptr, "a step within a step");
  KRAIT_DISPATCH(device, gather_steps(steps_, device, rows, scans));
  current_deferred() = steps_.get();
}

StepScope::~StepScope() { current_deferred() = nullptr; }

void StepScope::finish() {
  if (steps_) steps_->flush();
}

}  // namespace krait::kernels

#include "kernels/step_scope.h"

#include "kernels/cuda/few_queue.h"
#include "kernels/cuda/hopper.h"
#include "kernels/cuda/rows_queue.h"

namespace krait::kernels::cuda {

void gather_steps(std::unique_ptr<Deferred>& steps, Device device, int64_t rows, bool scans) {
  if (!runs_sm90(device)) return;
  steps = rows > kFewRows || scans ? gather_rows(device, scans && rows <= kFewScanRows) : gather_few(device);
}

}  // namespace krait::kernels::cuda

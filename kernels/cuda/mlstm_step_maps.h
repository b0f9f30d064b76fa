#pragma once
#include "kernels/mlstm_step.h"

namespace krait::kernels::cuda {

/// Whether mlstm_step_maps has one kernel for these sizes and weights. With more than kFewRows rows, when the kernel behind
/// it begins, all in front of it have finished.
bool mlstm_maps_fit(int64_t rows, const Tensor& conv, const MlstmStepMapsWeights& w);

}  // namespace krait::kernels::cuda

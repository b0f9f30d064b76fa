#pragma once
#include "kernels/mlstm_step.h"

// For kernels that are neighbours of those that few_queue.h gathers.
namespace krait::kernels::cuda {

/// gather_few_norm of a LayerNorm whose weight is w + weight_offset.
bool gather_few_layer_norm(Tensor& y, Tensor& sum, Tensor& mean, Tensor& rstd, const Tensor& x, const Tensor& residual, const Tensor& w,
                           const Tensor& b, double eps, double weight_offset);
/// The maps behind the up-projection of an mLSTM block, of which x_m is the first half, as one kernel with it. gates are
/// allocated here.
bool gather_few_mlstm_maps(MlstmStepMaps& out, Tensor& conv, const Tensor& x_m, const MlstmStepMapsWeights& w);
/// Launches what waits for a kernel that lets the next begin at once. True when it may read `state`, which no other kernel
/// of this scope writes, before the kernel in front has finished; behind its launch stands few_launched.
bool few_reads_ahead(Device device, const Tensor& state);
/// A kernel that made y, which a map that waits may read.
void few_launched(const Tensor& y);

}  // namespace krait::kernels::cuda

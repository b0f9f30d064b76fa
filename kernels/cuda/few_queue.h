#pragma once
#include "kernels/attention_append.h"
#include "kernels/linear.h"
#include "kernels/mlstm_step.h"
#include "kernels/step_scope.h"

// A decoding step of 1 to 8 rows: an operation waits for the next one, and neighbours run as one kernel where there is
// such (few_map.h): a norm and the linear map behind it, a linear map and the sum with the residual stream, the maps of
// gated units and their product, the up-projection of an mLSTM block and its maps. Kernels begin while the one in front
// still runs (overlap.cuh).
namespace krait::kernels::cuda {

std::unique_ptr<Deferred> gather_few(Device device);

/// Each is true when it took the operation, with outputs allocated by the caller; false without such a scope, or where it
/// does not serve. mean and b are undefined in RMSNorm; residual and sum where nothing is added. The norm's weight is
/// w + weight_offset.
bool gather_few_norm(bool centred, Tensor& y, Tensor& sum, Tensor& mean, Tensor& rstd, const Tensor& x, const Tensor& residual,
                     const Tensor& w, const Tensor& b, double eps, double weight_offset);
bool gather_few_linear(Tensor& y, const Gemm& g, const Tensor& bias, Epilogue epilogue);
bool gather_few_gated_units(Tensor& h, Tensor& pre, const Gemm& g);
bool gather_few_attention(Tensor& o, const Tensor& qkv, Tensor& k_cache, Tensor& v_cache, const Tensor& position, const AttentionAppend& a);
/// The maps behind the up-projection of an mLSTM block, of which x_m is the first half, as one kernel with it. gates are
/// allocated here.
bool gather_few_mlstm_maps(MlstmStepMaps& out, Tensor& conv, const Tensor& x_m, const MlstmStepMapsWeights& w);
/// sample_next (kernels/sample.h) of temperature 0, behind the map that makes the logits.
bool gather_few_draw(Tensor& made, Tensor& last, Tensor& position, Tensor& step, const Tensor& logits);

/// For kernels between these. Launches what waits, for one that lets the next begin at once; true when that may read
/// `state`, which no other kernel of this scope writes, before the kernel in front has finished. Behind its launch stands
/// few_launched.
bool few_reads_ahead(Device device, const Tensor& state);
/// A kernel that made y, which a map that waits may read.
void few_launched(const Tensor& y);

}  // namespace krait::kernels::cuda

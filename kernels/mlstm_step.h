#pragma once
#include "core/gpu_backend.h"
#include "kernels/mlstm.h"
#include "kernels/mlstm_block.h"

namespace krait {
namespace kernels {

/// What lies between the two projections of an mLSTM block (Beck et al. 2024, figure 11) for one position, in two parts:
/// gates look at all channels, whose sums over the members of a tensor group go between them.
///
/// Maps (kernels/causal_conv1d.h, kernels/mlstm_block.h for sequences):
///   x_c = silu(conv(x_m))     q = Wq x_c     k = Wk x_c     v = Wv x_m     gates = Gq q + Gk k + Gv v
/// conv (b, taps - 1, e), the inputs before, moves on in place. x_m (b, e), rows may lie apart; conv_weight (e, taps),
/// conv_bias (e) or undefined; all of them and the weights fp32, bf16 or fp64 alike. gates (b, parts, n) are partial sums
/// over channels in the dtype of sums, as many as it takes.
struct MlstmStepMaps { Tensor q, k, v, x_c, gates; };
struct MlstmStepMapsWeights { Tensor conv_weight, conv_bias; MlstmMapsWeights maps; };
MlstmStepMaps mlstm_step_maps(Tensor& conv, const Tensor& x_m, const MlstmStepMapsWeights& w);

/// Output: with [i; f] = sum of the parts of gates + gate_bias, the cell's step (mlstm_step in kernels/mlstm.h) and
///   y = (head_norm(h) (1 + norm) + skip x_c) silu(z)
/// The state advances in place. z (b, e), rows may lie apart; gate_bias (2 heads) and norm (e) in the dtype of sums.
struct MlstmStepOutputWeights { Tensor gate_bias, norm, skip; double eps = 1e-6, norm_eps = 1e-5; };
Tensor mlstm_step_output(MlstmState& state, const MlstmStepMaps& in, const Tensor& z, const MlstmStepOutputWeights& w);

/// Positions that C and n have not taken in: with them a step reads C and writes it once in `size` positions, all at once, so
/// that C may be bf16 and is rounded that seldom. The same numbers up to rounding. On GPUs, for what mlstm_recent() allows;
/// mlstm_step_maps stands between two steps.
struct MlstmRecent {
  Tensor k, v;     // (b, heads, size, dq), (b, heads, size, dv), like q
  Tensor gates;    // (b, heads, size, 2) fp32: log sigmoid(f), i
  Tensor count;    // (b, heads) int32
  Tensor arrived;  // (b, heads) int32: the backend's, 0 between steps
};
Tensor mlstm_step_output(MlstmState& state, MlstmRecent& recent, const MlstmStepMaps& in, const Tensor& z, const MlstmStepOutputWeights& w);
/// None yet, for a state and the maps in front of it; undefined where such steps are not served, or are no faster.
MlstmRecent mlstm_recent(const MlstmState& state, const Tensor& conv, const MlstmStepMapsWeights& w);

// On a GPU: done says whether it has one kernel for it; else nothing was written, and the operations for sequences run.
// Everything but x_m and z is contiguous, nothing is empty. gates are the backend's to allocate.
KRAIT_GPU_BACKEND(void mlstm_step_maps(bool& done, MlstmStepMaps& out, Tensor& conv, const Tensor& x_m, const MlstmStepMapsWeights& w);
                  void mlstm_step_output(bool& done, Tensor& y, MlstmState& state, const MlstmStepMaps& in, const Tensor& z,
                                         const MlstmStepOutputWeights& w);
                  void mlstm_step_output(Tensor& y, MlstmState& state, MlstmRecent& recent, const MlstmStepMaps& in, const Tensor& z,
                                         const MlstmStepOutputWeights& w);
                  void mlstm_recent_fits(bool& fits, const MlstmState& state, const Tensor& conv, const MlstmStepMapsWeights& w))

}  // namespace kernels
}  // namespace krait

#pragma once
#include "autograd/state_passing.h"
#include "autograd/variable.h"
#include "kernels/mlstm.h"

namespace krait {
inline namespace autograd {

using kernels::MlstmOptions;

/// The state of the matrix memory: c (b, heads, dq, dv), n (b, heads, dq) and m (b, heads), which has no gradient.
/// All undefined: the zero state.
struct MlstmMemory {
  Variable c, n;
  Tensor m;
};
struct MlstmResult {
  Variable h;
  MlstmMemory last;
};

class HalvesGradient;
/// What follows the cell in its block: mlstm_output (autograd/mlstm_block.h). w undefined: nothing. The gradient of z is the
/// second half of `gradient`, where that is given.
struct MlstmHeadOutput {
  Variable w, skip, x_c, z;
  double eps = 1e-5;
  std::shared_ptr<HalvesGradient> gradient;
};

/// mLSTM over q, k (b, l, heads, dq), v (b, l, heads, dv), gate pre-activations i, f (b, l, heads), fp32 (fp64 for
/// fp64): kernels/mlstm.h. h (b, l, heads, dv) is fp32 (fp64 for fp64) also in bf16. The state is the zero state again
/// where segments (b, l) begin a document. With pieces, q, k, .. are the own piece of a sequence that several members
/// share: the states of the others pass through it, `initial` (a value, alike on all) enters the first piece, the last
/// state is that of the last. With an output h is its y (b, l, heads dv), and the gradient of the cell's h goes from one
/// to the other as the kernels want it.
MlstmResult mlstm(const Variable& q, const Variable& k, const Variable& v, const Variable& i, const Variable& f,
                  const MlstmMemory& initial = {}, const Tensor& segments = {}, const MlstmOptions& options = {},
                  const SequencePieces& pieces = {}, const MlstmHeadOutput& output = {});

}  // namespace autograd
}  // namespace krait

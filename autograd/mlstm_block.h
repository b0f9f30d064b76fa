#pragma once
#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

/// The halves of [x_m; z] (.., 2 e), x_m for two readers: their gradients are joined in one pass.
struct MlstmHalves { Variable x_m, x_m_again, z; };
MlstmHalves mlstm_halves(const Variable& up);

/// q = Wq x_c, k = Wk x_c, v = Wv x_m with block-diagonal maps (blocks, side, side), and gates = G [q; k; v] (n, 3 e), in
/// the dtype of sums; see kernels/mlstm_block.h. x_c and x_m (.., e). `x_c` of the result is x_c again: what reads it
/// there has its gradient added in the same pass.
struct MlstmMapped { Variable q, k, v, gates, x_c; };
MlstmMapped mlstm_maps(const Variable& x_c, const Variable& x_m, const Variable& w_q, const Variable& w_k,
                       const Variable& w_v, const Variable& gates);

/// (head_norm(h) w + skip x_c) silu(z): h (.., heads, p) in the dtype of sums, w and skip (heads p), x_c and z
/// (.., heads p).
Variable mlstm_output(const Variable& h, const Variable& w, const Variable& skip, const Variable& x_c, const Variable& z,
                      double eps);

}  // namespace autograd
}  // namespace krait

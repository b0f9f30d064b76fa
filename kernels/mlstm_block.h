#pragma once
#include <functional>

#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// What the block of the mLSTM (Beck et al. 2024, figure 11) does around its cell, in one pass over the positions each.
///
/// Join: the gradient [a + b; z] (.., 2 e) of [x_m; z], whose first half has two readers. a, b, z (.., e) alike.
Tensor mlstm_join(const Tensor& a, const Tensor& b, const Tensor& z);

/// Maps: with the block-diagonal matrices Wq, Wk, Wv (blocks of 4 x 4) and the gates' matrix G = [Gq, Gk, Gv]
///   q = Wq x_c     k = Wk x_c     v = Wv x_m     gates = Gq q + Gk k + Gv v
/// Backward, with t_q = dq + Gq^T dgates and so on:
///   dx_c = Wq^T t_q + Wk^T t_k     dx_m = Wv^T t_v     dWq = sum t_q x_c^T, ..     dG = sum dgates [q; k; v]^T
/// x_c, x_m (.., e), w_* (e / 4, 4, 4), g (n, 3 e): fp32, fp64 or bf16. q, k, v (.., e); gates (.., n) in the dtype of
/// sums, not rounded.
struct MlstmMaps { Tensor q, k, v, gates; };
struct MlstmMapsWeights { Tensor w_q, w_k, w_v, g; };
/// x_c = silu(conv(x_m)) (kernels/causal_conv1d.h) and its maps in one pass over x_m (b, l, e), for sequences without a state
/// before them and documents in them.
struct MlstmConvMaps { Tensor x_c; MlstmMaps maps; };
bool mlstm_conv_maps_serve(const Tensor& x_m, const Tensor& conv_weight, const MlstmMapsWeights& w);
MlstmConvMaps mlstm_conv_maps_forward(const Tensor& x_m, const Tensor& conv_weight, const Tensor& conv_bias,
                                      const MlstmMapsWeights& w);
/// dx_more (undefined: zero) is added to dx_c. The gradients of weights are added to `into` where that is defined (a
/// gradient buffer) and returned undefined. `between`, where given, is called with dx_c and fills dx_m_into (like x_m, rows
/// may be apart), to which the maps' part is added: what goes from x_c back to x_m needs no buffer of its own.
struct MlstmMapsUpstream { Tensor dq, dk, dv, dgates, dx_more; };
struct MlstmMapsGrad { Tensor dx_c, dx_m; MlstmMapsWeights dw; };

/// Whether the two functions below take these: else the maps are block_linear and gate_linear.
bool mlstm_maps_serve(const Tensor& x_c, const MlstmMapsWeights& w);
MlstmMaps mlstm_maps_forward(const Tensor& x_c, const Tensor& x_m, const MlstmMapsWeights& w);
MlstmMapsGrad mlstm_maps_backward(const MlstmMapsUpstream& up, const Tensor& x_c, const Tensor& x_m,
                                  const MlstmMapsWeights& w, const MlstmMapsWeights& into, const Tensor& dx_m_into = {},
                                  const std::function<void(const Tensor& dx_c)>& between = {});

/// Output: the norm of each head (kernels/head_norm.h), the skip connection and the gate
///   u = head_norm(h) w + skip x_c     y = u silu(z)
/// Backward, with du = dy silu(z): dz = dy u silu'(z), dx_c = du skip, dskip = sum du x_c, and the norm's of du.
/// h (.., heads, p), w (heads p) and the statistics are fp32 (fp64 for fp64), h also bf16 beside bf16; x_c, z, y (.., heads p) and skip (heads p):
/// fp32, fp64 or bf16.
struct MlstmOutput { Tensor y, mean, rstd; };
/// On CUDA dh is rounded to x_c's dtype and dots = dh . h (.., heads) come with it, which are not: both as the backward of
/// the cell takes them. dh . h is what eps leaves of it: p mean_p(g xhat) eps rstd^2.
struct MlstmOutputGrad { Tensor dh, dots, dw, dskip, dx_c, dz; };
bool mlstm_output_serves(const Tensor& h);
MlstmOutput mlstm_output_forward(const Tensor& h, const Tensor& w, const Tensor& skip, const Tensor& x_c,
                                 const Tensor& z, double eps);
/// dw and dskip are added to the buffers where those are defined, and returned undefined. dz is written to dz_into (like z,
/// rows may be apart) where that is given.
MlstmOutputGrad mlstm_output_backward(const Tensor& dy, const Tensor& h, const Tensor& w, const Tensor& skip,
                                      const Tensor& x_c, const Tensor& z, const Tensor& mean, const Tensor& rstd,
                                      double eps, const Tensor& dw_into, const Tensor& dskip_into, const Tensor& dz_into = {});

// Backends: (r, e) with elements of a row side by side, rows of x_m, z, dx_m and dz may lie apart; r > 0; groups of four
// elements aligned as a whole. Sums in a fixed order, written, or added where asked for. Behind `between` dx_m is added to.
struct MlstmMapsAdds { bool q, k, v, g; };
KRAIT_BACKENDS(
    void mlstm_join(Tensor& out, const Tensor& a, const Tensor& b, const Tensor& z);
    void mlstm_maps_forward(MlstmMaps& out, const Tensor& x_c, const Tensor& x_m, const MlstmMapsWeights& w);
    void mlstm_conv_maps_forward(MlstmMaps& out, Tensor& x_c, const Tensor& x_m, int64_t l, const Tensor& conv_weight,
                                 const Tensor& conv_bias, const MlstmMapsWeights& w);
    void mlstm_maps_backward(Tensor& dx_c, Tensor& dx_m, MlstmMapsWeights& dw, MlstmMapsAdds adds,
                             const MlstmMapsUpstream& up, const Tensor& x_c, const Tensor& x_m, const MlstmMapsWeights& w,
                             const std::function<void()>& between);
    void mlstm_output_forward(MlstmOutput& out, const Tensor& h, const Tensor& w, const Tensor& skip, const Tensor& x_c,
                              const Tensor& z, double eps);
    void mlstm_output_backward(MlstmOutputGrad& grad, bool add_dw, bool add_dskip, const Tensor& dy, const Tensor& h,
                               const Tensor& w, const Tensor& skip, const Tensor& x_c, const Tensor& z,
                               const Tensor& mean, const Tensor& rstd, double eps))

}  // namespace kernels
}  // namespace krait

#pragma once
#include "core/gpu_backend.h"
#include "kernels/slstm.h"

namespace krait {
namespace kernels {

/// One position of sLSTM between its norm and its feed-forward (Beck et al. 2024, figure 10), for h heads of p units:
///   u = silu(conv(x)), or x without filters       a_i, a_f = W_i u, W_f u       a_z, a_o = W_z x, W_o x
///   (y, c, n, m) = SlstmCell(a, R y + bias)        out = head_norm(y) (1 + norm)
/// x (b, h p); conv (b, taps - 1, h p), the inputs before, and conv_weight (h p, taps), conv_bias (h p): all or none;
/// w_* (h, p, p), R (h, 4, p, p): fp32, bf16 or fp64 alike. cell (b, 4, h, p) = [y, c, n, m], bias (4, h, p) and norm (h p)
/// in the dtype of sums. conv and cell advance in place.
struct SlstmStepWeights {
  Tensor conv_weight, conv_bias, w_i, w_f, w_z, w_o, R, bias, norm;
  SlstmForget forget = SlstmForget::sigmoid;
  double norm_eps = 1e-5;
};
Tensor slstm_step(Tensor& conv, Tensor& cell, const Tensor& x, const SlstmStepWeights& w);

// On a GPU: done says whether it has one kernel for it; else nothing was written, and the operations for sequences run.
// Everything is contiguous, nothing is empty.
KRAIT_GPU_BACKEND(void slstm_step(bool& done, Tensor& y, Tensor& conv, Tensor& cell, const Tensor& x, const SlstmStepWeights& w))

}  // namespace kernels
}  // namespace krait

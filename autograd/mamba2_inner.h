#pragma once
#include "autograd/gated_rms_norm.h"
#include "autograd/ssd.h"
#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

/// What a Mamba-2 layer does behind its inner projection, on zxbcdt (b, l, 2e + 2gn + h or more) = [z; x; B; C; dt], what
/// is more being ignored (norm_weight has e values):
///   [x~; B~; C~] = silu(conv1d([x; B; C]))     y = ssd(x~, dt', a, B~, C~, D)     out = gated_rms_norm(y, z) out_weight^T
/// The same as causal_conv1d, ssd_time_step, ssd_packed, gated_rms_norm and linear one after the other, but backward
/// computes the convolution, the time steps and the normalised y again and writes the gradients of the five parts where
/// they belong: per token it keeps zxbcdt, y and the norm's root, not 3e + 2gn values more.
/// conv_bias, D, out_bias, the states and segments may be undefined. Without out_weight the normalised y comes out. With
/// options.pieces zxbcdt is the own piece of a sequence that several members share: conv_state and ssm_state (values, alike
/// on all) belong in front of the first, what lies before the others is exchanged.
struct Mamba2InnerArguments {
  Variable zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, out_weight, out_bias;
  Variable conv_state = {}, ssm_state = {};
  SsdSizes sizes = {};
  SsdOptions options = {};
  double dt_low = 0, dt_high = 0, norm_eps = 1e-5;
  bool norm_first = false;
  bool keep_state = true;  // else ssm_state comes out undefined
  NormMembers norm_members = {};  // where one group's heads lie on several processes
};
struct Mamba2InnerOut { Variable y, conv_state, ssm_state; };
Mamba2InnerOut mamba2_inner(const Mamba2InnerArguments& in);

}  // namespace autograd
}  // namespace krait

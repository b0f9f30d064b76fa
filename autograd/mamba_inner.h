#pragma once
#include "autograd/state_passing.h"
#include "autograd/variable.h"
#include "core/comm/process_group.h"

namespace krait {
inline namespace autograd {

/// What a Mamba layer does behind its inner projection, on xz (b, l, 2e) = [x; z]:
///   x~ = silu(conv1d(x))     [d; B; C] = x_proj x~     y = selective_scan(x~, dt_proj d, A, B, C, D, z, dt_bias)
///   out = out_proj y
/// The same as causal_conv1d, linear and selective_scan one after the other, but backward computes x~, dt_proj d and y
/// again: per token it keeps xz, [d; B; C] and the scan's states, not 3e values more.
/// x_proj (r + 2n, e), dt_proj (e, r), A (e, n), out_proj (m, e); the rest as in those functions. conv_bias, D, the states and segments
/// may be undefined. With pieces, xz is the own piece of a sequence that several members share: conv_state and ssm_state
/// (values, alike on all) belong in front of the first, what lies before the others is exchanged, and the ssm_state
/// returned is that of the last (of the own one, if pieces.last asks for none).
struct MambaInnerArguments {
  Variable xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, out_proj;
  Variable conv_state = {}, ssm_state = {};
  Tensor segments = {};
  SequencePieces pieces = {};
  comm::GroupPtr tensor = {};  // null, or a group whose members have some of the channels each: x_proj's products are summed, out is the own part
};
struct MambaInnerOut { Variable out, conv_state, ssm_state; };
MambaInnerOut mamba_inner(const MambaInnerArguments& in);

}  // namespace autograd
}  // namespace krait

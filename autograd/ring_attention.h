#pragma once
#include "autograd/variable.h"
#include "core/comm/process_group.h"
#include "kernels/attention.h"

namespace krait {
inline namespace autograd {

using kernels::AttentionOptions;

/// Causal self-attention (kernels/attention.h) of sequences that lie over a group in contiguous pieces (Liu et al. 2023,
/// "Ring attention"): qkv (b, l, (hq + 2 hkv) d), the own piece in the order q, k, v, gives (b, l, hq d).
/// Keys and values travel the ring while the block that is there is worked on; parts are joined by their lse.
/// So that no member waits for the end of the sequence, the rows are exchanged first: of the sequence's 2 S half
/// pieces member s works on s and 2 S - 1 - s, whose causal work is the same for all s, and the result goes back.
/// Backward: keys, values and their fp32 gradients travel the same ring, until the gradients are home.
/// options: scale, window, alibi_slopes; q_segments (b, l) of the own piece; dropout (l a multiple of 8) with the heads
/// of `part`. The rest is the ring's.
Variable ring_attention(const Variable& qkv, int64_t hq, int64_t hkv, const AttentionOptions& options,
                        const comm::GroupPtr& group);

}  // namespace autograd
}  // namespace krait

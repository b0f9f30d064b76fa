#pragma once
#include "autograd/variable.h"
#include "core/comm/process_group.h"
#include "kernels/attention.h"

namespace krait {
inline namespace autograd {

using kernels::AttentionOptions;

/// Ways to attend over sequences that lie over a group of S members in contiguous pieces of l positions.
///   ring        keys and values travel (autograd/ring_attention.h)
///   all_to_all  each member takes hq / S heads over the whole sequence (Jacobs et al. 2023, "DeepSpeed Ulysses")
///   halo        the window - 1 keys and values in front of the own piece are fetched
enum class SequenceAttention : uint8_t { ring, all_to_all, halo };
const char* name_of(SequenceAttention way);

/// The way for these sizes, by what is sent: a halo where the window is below half the sequence, else all-to-all where
/// S divides the heads, else the ring. Dropout has masks at multiples of 8 (ring) or 4 (halo) positions per member.
/// `wanted`: auto | ring (a halo where it sends less) | all_to_all. Throws where the one asked for is impossible.
SequenceAttention choose_sequence_attention(const std::string& wanted, int64_t hq, int64_t l,
                                            const AttentionOptions& options, const comm::ProcessGroup& group);

/// Causal self-attention of the own pieces qkv (b, l, (hq + 2 hkv) d) to (b, l, hq d). options as for ring_attention().
Variable sequence_attention(SequenceAttention way, const Variable& qkv, int64_t hq, int64_t hkv,
                            const AttentionOptions& options, const comm::GroupPtr& group);

}  // namespace autograd
}  // namespace krait

#pragma once
#include <vector>

#include "autograd/variable.h"
#include "core/comm/process_group.h"

namespace krait {
inline namespace autograd {

/// A sequence in contiguous pieces, one on each member of a group, through which a linear recurrence runs:
///   E_r = a_r H_r + own_r        H_{r+1} = E_r        H_0 = the initial state
/// H_r enters piece r, E_r leaves it; own_r is what the piece makes of zero and a_r its total decay, 0 where a document
/// begins inside it. Where one begins at the edge, H_{r+1} = 0. The members gather all (a, own) at once and each sums up
/// the H of its own piece. In backward the gradients g_r that the outputs send to H_r are gathered, and
///   L_{r-1} = g_r + a_r L_r        (0 across the edge of a document)        L_last = 0
/// is the gradient of E_{r-1}: with it and H, the ordinary backward of the piece is exact.
struct SequencePieces {
  comm::GroupPtr group = {};
  Tensor whole;   // (pieces, b) fp64, 1: the piece lies in one document, or 0. Undefined without documents
  Tensor joined;  // (pieces, b) fp64, 1: it continues the document of the piece before it, or 0
  bool last = true;  // the state that leaves the last piece is wanted, on every member

  int64_t count() const { return group ? group->size() : 1; }
  int64_t rank() const { return group ? group->rank() : 0; }
  bool several() const { return count() > 1; }
};

/// segments (b, l) int32: the documents of the own piece, numbered alike on all members; undefined: one. A call of all.
SequencePieces sequence_pieces(const comm::GroupPtr& group, const Tensor& segments);

/// Every member's tensors with the pieces as a new first dimension, in one all-gather. One floating dtype.
std::vector<Tensor> gather_pieces(const std::vector<Tensor>& own, const SequencePieces& pieces);

/// t times a factor that lacks t's last dimensions.
Tensor scale_leading(const Tensor& factor, const Tensor& t);

/// decays times pieces.whole, where that is defined. decays (pieces, b, ...).
Tensor cut_decays(const Tensor& decays, const SequencePieces& pieces);

/// H of the own piece (undefined where nothing comes in: piece 0 without an initial state) and, where pieces.last asks for
/// it, E of the last one. They keep nothing of what was gathered.
/// own (pieces, b, ...); decays (pieces, b, ...) of as many or fewer dimensions, broadcast at the end; initial (b, ...).
struct PassedState { Tensor before, last; };
PassedState pass_states(const Tensor& own, const Tensor& decays, const Tensor& initial, const SequencePieces& pieces);

/// L of the own piece, undefined on the last. gradients (pieces, b, ...) are the g.
Tensor pass_gradients(const Tensor& gradients, const Tensor& decays, const SequencePieces& pieces);

/// The same for states that are kept scaled by e^{-m} (mLSTM): with own and initial m (own: as gathered; initial: (b, ..)
/// or undefined, 0), m' = max(log_decay + m, m_own) behind each piece, and a_r = e^{log_decay + m - m'} and
/// e^{m_own - m'}, by which own_r is to be scaled. Across the edge of a document m = 0.
struct PassedScale { Tensor decays, own_scales, before, last; };
PassedScale pass_scales(const Tensor& log_decays, const Tensor& own, const Tensor& initial, const SequencePieces& pieces);

/// States carried between calls are values: throws when a gradient is wanted of one that several members share.
void check_carried(const char* op, const SequencePieces& pieces, const Variable& initial, const Tensor& dfinal = {});

}  // namespace autograd
}  // namespace krait

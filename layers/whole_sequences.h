#pragma once
#include <functional>

#include "autograd/recurrent.h"
#include "layers/mixer.h"

namespace krait::layers {

// Layers that need whole sequences, on pieces x (b, l, c) of sequences that lie over the S members of a group.

/// For what cannot carry a state on over a group: throws where there is one, and says what to do.
void require_no_state(const char* layer, const LayerState* state, const comm::ProcessGroup& group);

/// What a layer makes of whole sequences (b, L, c): the same shape but for the channels.
using WholeSequences = std::function<Variable(const Variable& x, const SequenceInfo& info)>;
/// Segments and positions of the whole sequences (b, L).
SequenceInfo gather_info(const SequenceInfo& info, comm::ProcessGroup& group);
/// This member's part of a state that is alike on all, along the dimension of the rows (heads, channels) that it takes.
Tensor own_part_of(const Tensor& state, int64_t dim, const comm::ProcessGroup& group);
/// Each member takes b / S of the sequences, whole, and gives their results back. S must divide b.
Variable over_rows(const Variable& x, const SequenceInfo& info, const comm::GroupPtr& group, const WholeSequences& f);

/// A recurrence on x (n, l, c) from a state, or from none, to y and the state after it. Rows are independent.
using Recurrence = std::function<RecurrentOut(const Variable& x, const Tensor& segments, const Variable& state)>;
/// Each member continues from the state that its left neighbour hands on. The members work one after the other, so the
/// rows are handed on in groups: while a member works on one, its left neighbour works on the next.
/// state (.., n, ..) with the rows in dimension 1: of this shape for one row, in the dtype of sums. `carried`, alike on all
/// members, where the first begins (undefined: from nothing); becomes the state after the last, also on all.
Variable along_chain(const Variable& x, const SequenceInfo& info, const comm::GroupPtr& group, const Shape& state_of_one,
                     const Recurrence& f, Tensor& carried);

}  // namespace krait::layers

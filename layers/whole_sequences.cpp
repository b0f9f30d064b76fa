#include "layers/whole_sequences.h"

#include "autograd/collective.h"
#include "autograd/elementwise.h"
#include "autograd/sequence_exchange.h"
#include "autograd/shape.h"
#include "core/comm/collectives.h"
#include "kernels/elementwise.h"
#include "layers/sequence_history.h"

namespace krait::layers {

void require_no_state(const char* layer, const LayerState* state, const comm::ProcessGroup& group) {
  KRAIT_CHECK(!state || group.size() == 1, "{}: a state that is carried on needs whole sequences on a rank, but they lie "
              "over {}: set data.state: reset for training, parallelism.sequence: 1 for generation and streaming evaluation",
              layer, group.size());
}

Tensor own_part_of(const Tensor& state, int64_t dim, const comm::ProcessGroup& group) {
  return state.defined() ? comm::own_part(state, dim, group).contiguous() : Tensor();
}

SequenceInfo gather_info(const SequenceInfo& info, comm::ProcessGroup& group) {
  SequenceInfo all;
  if (info.segments.defined()) all.segments = comm::all_gather(info.segments, 1, group);
  if (info.positions.defined()) all.positions = comm::all_gather(info.positions, 1, group);
  return all;
}

Variable over_rows(const Variable& x, const SequenceInfo& info, const comm::GroupPtr& group, const WholeSequences& f) {
  SequenceInfo mine;
  if (info.segments.defined()) mine.segments = comm::all_to_all(info.segments, 0, 1, *group);
  if (info.positions.defined()) mine.positions = comm::all_to_all(info.positions, 0, 1, *group);
  return all_to_all(f(all_to_all(x, 0, 1, group), mine), 1, 0, group);
}

namespace {

// (b) of the dtype: 1 where the own piece goes on with the document that the piece to the left ends in.
Tensor goes_on(const Tensor& segments, comm::ProcessGroup& group, DType dtype) {
  const Tensor last = comm::all_gather(segments.slice(1, segments.size(1) - 1, segments.size(1)), 1, group);
  if (group.rank() == 0) return {};
  return kernels::equal(last.select(1, group.rank() - 1).to(DType::f64), segments.select(1, 0).to(DType::f64)).to(dtype);
}

// Groups of rows: enough of them to keep S members busy, and no more than that, since few rows at a time are slow.
int64_t groups_of_rows(int64_t b, int64_t members) {
  int64_t groups = 1;
  for (int64_t n = 1; n <= b && n <= 4 * members; ++n)
    if (b % n == 0) groups = n;
  return groups;
}

}  // namespace

Variable along_chain(const Variable& x, const SequenceInfo& info, const comm::GroupPtr& group, const Shape& state_of_one,
                     const Recurrence& f, Tensor& carried) {
  const int64_t b = x.size(0), groups = groups_of_rows(b, group->size()), n = b / groups;
  const DType wide = accum_dtype(x.dtype());
  const Tensor kept = info.segments.defined() ? goes_on(info.segments, *group, wide) : Tensor();
  Vars all;
  Tensor left_behind = carried.defined() ? empty(state_of_one.with(1, b), wide, x.device()) : Tensor();
  for (int64_t row = 0; row < b; row += n) {
    const Variable rows = slice(x, 0, row, row + n);
    Variable state = receive_from_left(rows, state_of_one.with(1, n), wide, group);
    if (carried.defined() && group->rank() == 0) state = Variable(carried.slice(1, row, row + n).contiguous());
    if (state.defined() && kept.defined()) {
      Shape shape(std::vector<int64_t>(static_cast<size_t>(state.ndim()), 1));
      shape[1] = n;
      state = state * Variable(kept.slice(0, row, row + n).view(shape));
    }
    const auto [y, last] = f(rows, info.segments.defined() ? info.segments.slice(0, row, row + n) : Tensor(), state);
    if (carried.defined()) {
      Tensor place = left_behind.slice(1, row, row + n);
      copy_(place, last.data());
    }
    all.push_back(send_right(y, last, group));
  }
  if (carried.defined()) carried = from_last_piece(left_behind, group);
  return concat(all, 0);
}

}  // namespace krait::layers

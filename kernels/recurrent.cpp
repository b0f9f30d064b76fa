#include "kernels/recurrent.h"

#include "kernels/recurrent_cells.h"

namespace krait::kernels {

namespace {

template <class Cell>
constexpr CellSizes kSizesOf{Cell::kGates, Cell::kStates, Cell::kSaved, Cell::kSplits};

CellSizes sizes_of(RecurrentCell cell) {
  return visit_cell(cell, []<class Cell>() { return kSizesOf<Cell>; });
}

}  // namespace

std::string_view name_of(RecurrentCell cell) {
  return cell == RecurrentCell::rnn ? "rnn" : cell == RecurrentCell::lstm ? "lstm" : "gru";
}
int64_t gates_of(RecurrentCell cell) { return sizes_of(cell).gates; }
int64_t states_of(RecurrentCell cell) { return sizes_of(cell).states; }

RecurrenceOut recurrent_forward(RecurrentCell cell, const Tensor& x, const Tensor& w, const Tensor& bias,
                                const Tensor& state, const Tensor& segments, bool save) {
  RecurrenceForward r = begin_recurrence(name_of(cell), sizes_of(cell), x, w, bias, state, segments, save);
  if (!finish_empty(r)) KRAIT_DISPATCH(x.device(), recurrent_forward(r, cell));
  return r.out;
}

RecurrenceGrad recurrent_backward(RecurrentCell cell, const Tensor& dy, const Tensor& dstate, const Tensor& w,
                                  const RecurrenceOut& out, const Tensor& segments, bool want_dstate,
                                  const Tensor& dw_into, const Tensor& dbias_into) {
  RecurrenceBackward r = begin_recurrence_backward(sizes_of(cell), dy, dstate, w, out, segments, want_dstate);
  if (!finish_empty(r)) KRAIT_DISPATCH(w.device(), recurrent_backward(r, cell));
  return finish_recurrence_backward(r, out.y_prev, dw_into, dbias_into);
}

}  // namespace krait::kernels

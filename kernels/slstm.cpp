#include "kernels/slstm.h"

#include "kernels/recurrent_cells.h"

namespace krait::kernels {

namespace {
using Cell = SlstmCell<false>;
constexpr CellSizes kSizes{Cell::kGates, Cell::kStates, Cell::kSaved, Cell::kSplits};
}

RecurrenceOut slstm_forward(const Tensor& wx, const Tensor& R, const Tensor& bias, const Tensor& state,
                            const Tensor& segments, SlstmForget forget, bool save) {
  RecurrenceForward r = begin_recurrence("slstm", kSizes, wx, R, bias, state, segments, save);
  if (!finish_empty(r)) KRAIT_DISPATCH(wx.device(), slstm_forward(r, forget));
  return r.out;
}

RecurrenceGrad slstm_backward(const Tensor& dy, const Tensor& dstate, const Tensor& R, const RecurrenceOut& out,
                              const Tensor& segments, bool want_dstate, const Tensor& dR_into,
                              const Tensor& dbias_into) {
  RecurrenceBackward r = begin_recurrence_backward(kSizes, dy, dstate, R, out, segments, want_dstate);
  if (!finish_empty(r)) KRAIT_DISPATCH(R.device(), slstm_backward(r));
  return finish_recurrence_backward(r, out.y_prev, dR_into, dbias_into);
}

}  // namespace krait::kernels

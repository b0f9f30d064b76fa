#include "kernels/slstm.h"

#include "kernels/cpu/recurrence.h"
#include "kernels/recurrent_cells.h"

namespace krait::kernels::cpu {

namespace {
SlstmCell cell_of(SlstmForget forget) {
  SlstmCell cell;
  cell.exp_forget = forget == SlstmForget::exp;
  return cell;
}
}  // namespace

void slstm_forward(RecurrenceForward& r, SlstmForget forget) {
  visit_float(r.x.dtype(), [&]<class T>() { recurrence_forward<SlstmCell, T>(r, cell_of(forget)); });
}

void slstm_backward(RecurrenceBackward& r, SlstmForget forget) {
  visit_float(r.dx.dtype(), [&]<class T>() { recurrence_backward<SlstmCell, T>(r, cell_of(forget)); });
}

}  // namespace krait::kernels::cpu

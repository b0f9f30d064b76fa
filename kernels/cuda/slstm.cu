#include "kernels/slstm.h"

#include "kernels/cuda/recurrence.cuh"
#include "kernels/recurrent_cells.h"

namespace krait::kernels::cuda {

void slstm_forward(RecurrenceForward& r, SlstmForget forget) {
  visit_float(r.x.dtype(), [&]<class T>() {
    if (forget == SlstmForget::exp) return recurrence_forward<SlstmCell<true>, T>(r, {});
    recurrence_forward<SlstmCell<false>, T>(r, {});
  });
}

void slstm_backward(RecurrenceBackward& r) {
  visit_float(r.dx.dtype(), [&]<class T>() { recurrence_backward<SlstmCell<false>, T>(r, {}); });
}

}  // namespace krait::kernels::cuda

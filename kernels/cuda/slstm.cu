#include "kernels/slstm.h"

#include "kernels/cuda/recurrence.cuh"
#include "kernels/cuda/slstm_cluster.h"
#include "kernels/recurrent_cells.h"

namespace krait::kernels::cuda {

void slstm_forward(RecurrenceForward& r, SlstmForget forget) {
  if (slstm_cluster_forward(r, forget)) return;
  visit_float(r.x.dtype(), [&]<class T>() {
    if (forget == SlstmForget::exp) return recurrence_forward<SlstmCell<true>, T>(r, {});
    recurrence_forward<SlstmCell<false>, T>(r, {});
  });
}

void slstm_backward(RecurrenceBackward& r) {
  if (slstm_cluster_backward(r)) return;
  visit_float(r.dx.dtype(), [&]<class T>() { recurrence_backward<SlstmCell<false>, T>(r, {}); });
}

}  // namespace krait::kernels::cuda

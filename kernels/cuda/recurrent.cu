#include "kernels/recurrent.h"

#include "kernels/cuda/recurrence.cuh"
#include "kernels/recurrent_cells.h"

namespace krait::kernels::cuda {

void recurrent_forward(RecurrenceForward& r, RecurrentCell cell) {
  visit_float(r.x.dtype(), [&]<class T>() {
    switch (cell) {
      case RecurrentCell::rnn: return recurrence_forward<RnnCell, T>(r, {});
      case RecurrentCell::lstm: return recurrence_forward<LstmCell, T>(r, {});
      case RecurrentCell::gru: return recurrence_forward<GruCell, T>(r, {});
    }
  });
}

void recurrent_backward(RecurrenceBackward& r, RecurrentCell cell) {
  visit_float(r.dx.dtype(), [&]<class T>() {
    switch (cell) {
      case RecurrentCell::rnn: return recurrence_backward<RnnCell, T>(r, {});
      case RecurrentCell::lstm: return recurrence_backward<LstmCell, T>(r, {});
      case RecurrentCell::gru: return recurrence_backward<GruCell, T>(r, {});
    }
  });
}

}  // namespace krait::kernels::cuda

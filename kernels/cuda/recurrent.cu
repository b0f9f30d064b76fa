#include "kernels/recurrent.h"

#include "kernels/cuda/recurrence.cuh"
#include "kernels/recurrent_cells.h"

namespace krait::kernels::cuda {

void recurrent_forward(RecurrenceForward& r, RecurrentCell cell) {
  visit_float(r.x.dtype(), [&]<class T>() {
    visit_cell(cell, [&]<class Cell>() { recurrence_forward<Cell, T>(r, {}); });
  });
}

void recurrent_backward(RecurrenceBackward& r, RecurrentCell cell) {
  visit_float(r.dx.dtype(), [&]<class T>() {
    visit_cell(cell, [&]<class Cell>() { recurrence_backward<Cell, T>(r, {}); });
  });
}

}  // namespace krait::kernels::cuda

#pragma once
#include <string_view>

#include "core/tensor.h"

namespace krait {
namespace kernels {

/// A recurrent layer with h independent heads of p units and G gates, in the order of time t:
///   r[g] = W[h,g] y_{t-1} + bias[g,h]          (G gates, p units)
///   (y_t, other states, saved_t) = cell(x_t, r, states_{t-1})
/// The cells are in kernels/recurrent_cells.h. Where a row's document changes, all states start from zero again.
///   x (b, l, G, h, p)   W (h, G, p, p), of unit p from unit p'   bias (G, h, p)   segments (b, l) int32
///   state (S, b, h, p): y first, then the cell's other states; undefined at the start: zero
/// x, W, y, dx, dW: fp32, bf16 or fp64. bias, states, saved and all sums are fp32 (fp64 for fp64).
struct RecurrenceOut {
  Tensor y;       // (b, l, h, p)
  Tensor state;   // after the last position
  Tensor saved;   // (b, l, K, h, p), or as the backend lays it out: what its backward needs; undefined unless asked for
  Tensor y_prev;  // (b, l, h, p) y_{t-1}, 0 where a document starts: for dW; undefined unless asked for
};
struct RecurrenceGrad {
  Tensor dx, dw, dbias;  // dW = sum over b, t of dr y_{t-1}^T; dbias = sum of dr
  Tensor dstate;         // of the state at the start; undefined unless asked for
};

/// What a backend's forward reads and fills; everything contiguous, b and l positive.
struct RecurrenceForward {
  Tensor x, w, bias, state0, segments;  // state0 and segments may be undefined
  RecurrenceOut out;
};
/// And its backward. dy and dstate may be undefined. dr, like dx, is what reaches r; undefined where it equals dx.
struct RecurrenceBackward {
  Tensor dy, dstate, w, saved, segments;
  Tensor dx, dr, dstate0;
};

/// How many values a cell keeps.
struct CellSizes {
  int64_t gates, states, saved;
  bool splits;  // dr differs from dx
};

/// Checks, makes contiguous, allocates. `op` stands in messages.
RecurrenceForward begin_recurrence(std::string_view op, CellSizes cell, const Tensor& x, const Tensor& w,
                                   const Tensor& bias, const Tensor& state0, const Tensor& segments, bool save);
/// For empty sequences, which no backend sees: the final state is the first, and so for their gradients.
bool finish_empty(RecurrenceForward& r);
bool finish_empty(RecurrenceBackward& r);

RecurrenceBackward begin_recurrence_backward(CellSizes cell, const Tensor& dy, const Tensor& dstate, const Tensor& w,
                                             const RecurrenceOut& out, const Tensor& segments, bool want_dstate0);
/// dW and dbias as one matrix product and one sum over all positions. With the gradient buffers dw_into and
/// dbias_into they are added there and returned undefined.
RecurrenceGrad finish_recurrence_backward(const RecurrenceBackward& r, const Tensor& y_prev, const Tensor& dw_into,
                                          const Tensor& dbias_into);

}  // namespace kernels
}  // namespace krait

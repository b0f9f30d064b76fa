#pragma once
#include "core/dispatch.h"
#include "kernels/recurrence.h"

namespace krait {
namespace kernels {

/// RNN, LSTM and GRU over whole sequences, as recurrences (kernels/recurrence.h) of one head: x (b, l, G, 1, p) is
/// W_ih x + b_ih of all positions, W (1, G, p, p) the rows of W_hh by gate, bias (G, 1, p) b_hh. Gates and
/// mathematics: RnnCell, LstmCell, GruCell in kernels/recurrent_cells.h.
enum class RecurrentCell : uint8_t { rnn, lstm, gru };
std::string_view name_of(RecurrentCell cell);
int64_t gates_of(RecurrentCell cell);
int64_t states_of(RecurrentCell cell);

RecurrenceOut recurrent_forward(RecurrentCell cell, const Tensor& x, const Tensor& w, const Tensor& bias,
                                const Tensor& state, const Tensor& segments, bool save);
/// dy and dstate (of the final state) may be undefined. `out` of a forward that saved.
RecurrenceGrad recurrent_backward(RecurrentCell cell, const Tensor& dy, const Tensor& dstate, const Tensor& w,
                                  const RecurrenceOut& out, const Tensor& segments, bool want_dstate,
                                  const Tensor& dw_into = {}, const Tensor& dbias_into = {});

KRAIT_BACKENDS(void recurrent_forward(RecurrenceForward& r, RecurrentCell cell);
               void recurrent_backward(RecurrenceBackward& r, RecurrentCell cell))

}  // namespace kernels
}  // namespace krait

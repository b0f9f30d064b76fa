#pragma once
#include "core/dispatch.h"
#include "kernels/recurrence.h"

namespace krait {
namespace kernels {

/// The cell of sLSTM (Beck et al. 2024) over whole sequences, as a recurrence (kernels/recurrence.h) with the gates
/// i, f, z, o and the states y, c, n, m: the mathematics is at SlstmCell in kernels/recurrent_cells.h.
///   wx (b, l, 4, h, p)   R (h, 4, p, p)   bias (4, h, p)   state (4, b, h, p)
enum class SlstmForget : uint8_t { sigmoid, exp };

RecurrenceOut slstm_forward(const Tensor& wx, const Tensor& R, const Tensor& bias, const Tensor& state,
                            const Tensor& segments, SlstmForget forget, bool save);
/// dy and dstate (of the final state) may be undefined. `out` of a forward that saved. Returned dstate only when
/// wanted, with 0 for m. What was saved tells the forget gates apart. See finish_recurrence_backward for the buffers.
RecurrenceGrad slstm_backward(const Tensor& dy, const Tensor& dstate, const Tensor& R, const RecurrenceOut& out,
                              const Tensor& segments, bool want_dstate, const Tensor& dR_into = {},
                              const Tensor& dbias_into = {});

KRAIT_BACKENDS(void slstm_forward(RecurrenceForward& r, SlstmForget forget);
               void slstm_backward(RecurrenceBackward& r))

}  // namespace kernels
}  // namespace krait

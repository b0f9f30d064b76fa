#pragma once
#include "kernels/recurrence.h"
#include "kernels/slstm.h"

namespace krait {
namespace kernels {
namespace cuda {

/// bf16 sLSTM with heads of 64, 128, 192 or 256 units on sm_90: false, and nothing done, for anything else.
bool slstm_cluster_forward(RecurrenceForward& r, SlstmForget forget);
bool slstm_cluster_backward(RecurrenceBackward& r);

}  // namespace cuda
}  // namespace kernels
}  // namespace krait

#pragma once
#include "core/gpu_backend.h"
#include "kernels/recurrent.h"

namespace krait {
namespace kernels {

/// One position of RNN, LSTM and GRU (kernels/recurrent_cells.h) with the maps in front of the cell, for p units, G gates and
/// S states:
///   (y, other states) = cell(W_ih x + b_ih, W_hh y + b_hh, states)
/// x (b, d), w_ih (G p, d), w_hh (G p, p), b_ih and b_hh (G p): fp32, bf16 or fp64 alike. state (b, S, 1, p), y first, in the
/// dtype of sums, contiguous, advances in place. The result (b, p) is y in the dtype of x.
struct RecurrentStepWeights { Tensor w_ih, w_hh, b_ih, b_hh; };
Tensor recurrent_step(RecurrentCell cell, Tensor& state, const Tensor& x, const RecurrentStepWeights& w);

// On a GPU: done says whether it has one kernel for it; else nothing was written, and the operations for sequences run.
// Everything is contiguous, nothing is empty.
KRAIT_GPU_BACKEND(void recurrent_step(bool& done, Tensor& y, Tensor& state, const Tensor& x, const RecurrentStepWeights& w, RecurrentCell cell))

}  // namespace kernels
}  // namespace krait

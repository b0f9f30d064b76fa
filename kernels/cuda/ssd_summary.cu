// What a piece of a sequence makes of a state, and what it sends back to it: the states' part of kernels/ssd.h without
// any output.
#include "kernels/cuda/ssd_mma.cuh"

namespace krait::kernels::cuda {

namespace {

// The sum of rows^T columns along the sequence into `last`.
void sum_states(Tensor& last, const Tensor& rows, const Tensor& columns, const Tensor& start, const SsdInput& in,
                bool reverse) {
  if (ssd::mma64::serves(in, reverse ? rows : Tensor(), {})) {
    ssd::mma64::Prepared(in, false).last_state(rows, columns, start, last, reverse);
    return;
  }
  const ssd::Pass pass(in);
  Tensor states = pass.own_states(rows, columns, reverse);
  pass.scan(states, start, last, reverse);
}

}  // namespace

void ssd_final_state(Tensor& state, const SsdInput& in) { sum_states(state, in.x, in.B, in.initial_state, in, false); }

void ssd_initial_gradient(Tensor& gradient, const Tensor& dy, const SsdInput& in) {
  sum_states(gradient, dy, in.C, {}, in, true);
}

}  // namespace krait::kernels::cuda

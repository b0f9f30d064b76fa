#pragma once
#include "core/tensor.h"
#include "kernels/ssd.h"

// The state-space recurrence over short sequences (kernels/ssd.h) as one lower triangle of L x L, without states: a product
// with a state costs a position as much as one with n positions, and the chunked form (ssd_chunk.h) has seven of them, this
// one none but the final state's.
namespace krait::kernels::cpu::ssd {

/// Whether the square serves: one piece of a sequence of at most 2n and 2 `chunk` positions, nothing before it.
template <class T>
bool in_one_square(const SsdInput& in);

/// final_state may be undefined.
template <class T>
void square_forward(Tensor& y, Tensor& final_state, const SsdInput& in);

/// Without a gradient of the final state.
template <class T>
void square_backward(SsdGrad& grad, const Tensor& dy, const SsdInput& in);

}  // namespace krait::kernels::cpu::ssd

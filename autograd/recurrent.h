#pragma once
#include "autograd/variable.h"
#include "kernels/recurrent.h"

namespace krait {
inline namespace autograd {

/// state (S, b, h, p) after the last position, in the dtype of sums: y first, then the cell's other states.
struct RecurrentOut {
  Variable y, state;
};

/// RNN, LSTM (gates i, f, g, o) and GRU (gates r, z, n, reset after the product); see kernels/recurrent.h.
/// x (b, l, in), w_ih (G p, in), w_hh (G p, p), b_ih and b_hh (G p); y (b, l, p).
/// state (S, b, 1, p): h, for the LSTM also c; or undefined for zero.
RecurrentOut recurrent(kernels::RecurrentCell cell, const Variable& x, const Variable& w_ih, const Variable& w_hh,
                       const Variable& b_ih, const Variable& b_hh, const Variable& state, const Tensor& segments);
inline RecurrentOut rnn(const Variable& x, const Variable& w_ih, const Variable& w_hh, const Variable& b_ih,
                        const Variable& b_hh, const Variable& state = {}, const Tensor& segments = {}) {
  return recurrent(kernels::RecurrentCell::rnn, x, w_ih, w_hh, b_ih, b_hh, state, segments);
}
inline RecurrentOut lstm(const Variable& x, const Variable& w_ih, const Variable& w_hh, const Variable& b_ih,
                         const Variable& b_hh, const Variable& state = {}, const Tensor& segments = {}) {
  return recurrent(kernels::RecurrentCell::lstm, x, w_ih, w_hh, b_ih, b_hh, state, segments);
}
inline RecurrentOut gru(const Variable& x, const Variable& w_ih, const Variable& w_hh, const Variable& b_ih,
                        const Variable& b_hh, const Variable& state = {}, const Tensor& segments = {}) {
  return recurrent(kernels::RecurrentCell::gru, x, w_ih, w_hh, b_ih, b_hh, state, segments);
}

}  // namespace autograd
}  // namespace krait

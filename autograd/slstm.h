#pragma once
#include "autograd/recurrent.h"
#include "kernels/slstm.h"

namespace krait {
inline namespace autograd {

using kernels::SlstmForget;

/// The sLSTM cell over wx (b, l, 4, h, p), gates i, f, z, o; see kernels/slstm.h. R (h, 4, p, p), bias (4, h, p).
/// state (4, b, h, p) = y, c, n, m at the start, or undefined for zero; segments (b, l) int32 or undefined.
RecurrentOut slstm(const Variable& wx, const Variable& R, const Variable& bias, const Variable& state,
                   const Tensor& segments, SlstmForget forget = SlstmForget::sigmoid);

/// The input part of the sLSTM gates, each a linear map within its head (h, p, p), (h, out, in):
///   (b, l, 4, h, p) = [w_i x_if, w_f x_if, w_z x_zo, w_o x_zo],     x_if, x_zo (b, l, h p)
Variable slstm_gates(const Variable& x_if, const Variable& x_zo, const Variable& w_i, const Variable& w_f,
                     const Variable& w_z, const Variable& w_o);

}  // namespace autograd
}  // namespace krait

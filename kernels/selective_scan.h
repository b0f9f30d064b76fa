#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// Selective scan (Gu & Dao 2023, eq. 2 with the discretisation of their code: A by zero-order hold, B by Euler).
/// For each channel and each of n states, with h before t = 0 equal to h0 or 0:
///   delta_t = softplus(dt_t + dt_bias)                       or dt_t + dt_bias
///   h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t           u_t = sum_n C_t h_t + D x_t
///   y_t = u_t silu(z_t)                                      or u_t without z
/// h starts from 0 at each document; h0 belongs to the document of t = 0. The final state is h after the last position.
/// Backward, with g = dy silu(z), lambda the gradient of h and the final state's gradient added to lambda_{l-1}:
///   lambda_t = g_t C_t + exp(delta_{t+1} A) lambda_{t+1}     dz = dy u silu'(z)    dC = sum_e g h
///   dB = sum_e lambda delta x                                dx = delta sum_n lambda B + D g
///   ddelta = sum_n lambda exp(delta A) h_{t-1} A + x sum_n lambda B
///   dA = sum_{b,t} lambda exp(delta A) h_{t-1} delta         dD = sum_{b,t} g x    dh0 = exp(delta_0 A) lambda_0
/// Only h before every kScanChunk-th position is kept (on CUDA with 16 states in bf16 every 16th, in bf16); inside a
/// chunk it is computed again.
inline constexpr int64_t kScanChunk = 64;

/// x, dt, z (b, l, e) and B, C (b, l, n): fp32, bf16 or fp64, alike; rows may be apart (slices of projections).
/// A (e, n), D, dt_bias (e), h0 (b, e, n): the dtype of sums (fp32; fp64 for fp64). D, z, dt_bias, h0, segments (b, l)
/// int32 may be undefined. n up to 256 on CUDA.
struct SelectiveScanInputs {
  Tensor x, dt, A, B, C, D, z, dt_bias, h0, segments;
  bool softplus = true;
};
/// y like x; final_state (b, e, n) in the dtype of sums; states, defined when asked for, is for the backward alone.
struct SelectiveScanOut { Tensor y, final_state, states; };
/// Like the inputs; undefined where those are. Sums are made in fp32 (fp64 for fp64) in a fixed order. y once more when
/// asked for.
struct SelectiveScanGrad { Tensor dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dh0, y = {}; };
/// dz: where dz goes (b, l, e, rows may be apart). y: the outputs too, for those who did not keep them.
struct SelectiveScanWants { Tensor dz = {}; bool y = false; };

SelectiveScanOut selective_scan_forward(const SelectiveScanInputs& in, bool save_states);
/// dy or dfinal may be undefined (0).
SelectiveScanGrad selective_scan_backward(const Tensor& dy, const Tensor& dfinal, const SelectiveScanInputs& in,
                                          const Tensor& states, const SelectiveScanWants& wants = {});
/// One piece of a sequence as seen from outside: h_out = exp(A deltas) h_in + state, where no document begins inside it.
/// state (b, e, n) is its final state from h0 (undefined: 0), deltas (b, e) = sum_t delta_t. Cheaper than the forward
/// pass: reads neither C nor D nor z, writes nothing per position.
struct SelectiveScanSummary { Tensor state, deltas; };
SelectiveScanSummary selective_scan_summary(const SelectiveScanInputs& in);
/// Gradient of h0 (b, e, n) from the outputs alone: sum_t exp(A (delta_1 + .. + delta_t)) g_t C_t over the first
/// document. Reads neither B nor D nor h0.
Tensor selective_scan_initial_gradient(const Tensor& dy, const SelectiveScanInputs& in);

/// One position: in.x, dt, z (b, e), B, C (b, n), in.h0 undefined; y (b, e). h (b, e, n) advances in place.
Tensor selective_scan_step(Tensor& h, const SelectiveScanInputs& in);

// The backends. Rows contiguous, parameters and states contiguous; states undefined when not wanted, else in the
// backend's own layout. Every gradient
// whose input is defined is written; dA, dD, ddt_bias, dh0 in the dtype of sums; dz's rows may be apart; y if defined.
KRAIT_BACKENDS(void make_scan_states(Tensor& states, const SelectiveScanInputs& in);
               void selective_scan_forward(Tensor& y, Tensor& final_state, Tensor& states,
                                           const SelectiveScanInputs& in);
               void selective_scan_backward(SelectiveScanGrad& grad, const Tensor& dy, const Tensor& dfinal,
                                            const SelectiveScanInputs& in, const Tensor& states);
               void selective_scan_summary(Tensor& state, Tensor& deltas, const SelectiveScanInputs& in);
               void selective_scan_initial_gradient(Tensor& gradient, const Tensor& dy, const SelectiveScanInputs& in))

/// For a backend whose backward writes only whole tensors and no y: false where that will do, else done in parts.
template <class Forward, class Backward>
bool selective_scan_backward_in_parts(SelectiveScanGrad& grad, const SelectiveScanInputs& in, const Forward& forward,
                                      const Backward& backward) {
  const bool apart = grad.dz.defined() && !grad.dz.is_contiguous();
  if (!apart && !grad.y.defined()) return false;
  SelectiveScanGrad whole = grad;
  whole.y = {};
  if (apart) whole.dz = empty(grad.dz.shape(), grad.dz.dtype(), grad.dz.device());
  backward(whole);
  if (apart) copy_(grad.dz, whole.dz);
  if (grad.y.defined()) {
    Tensor last = empty({in.x.size(0), in.x.size(2), in.A.size(1)}, in.A.dtype(), in.x.device()), states;
    forward(grad.y, last, states);
  }
  return true;
}

}  // namespace kernels
}  // namespace krait

#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

// Last step of the backward of S4's and S4D's kernels. Every (channel, state) has `5 + 2 rank` fp64 contributions:
// log_A_re, A_im, B (re, im), log_dt, then P of every rank (re, im). Sums in order of the channels and states.

/// contributions (h, n, 5 + 2 r). dlog_dt (h) sums over states; dlog_A_re, dA_im (s, n), dB (s, n, 2) and
/// dP (s, r, n, 2), undefined for r = 0, over the h / s channels of a set.
KRAIT_BACKENDS(void ssm_sum_gradients(Tensor& dlog_dt, Tensor& dlog_A_re, Tensor& dA_im, Tensor& dB, Tensor& dP,
                                      const Tensor& contributions))

}  // namespace kernels
}  // namespace krait

#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// The recurrent form of state-space layers with one input and output per channel (S4D, Gu et al. 2022, section 3; S4,
/// Gu et al. 2022, appendix C.2; spec/s4.md sections 5 and 9). Complex diagonal, n of each pair of conjugate states,
/// plus a real low-rank part of rank r (0 without M and Q):
///   x_t = A x_{t-1} - sum_r M_r (2 Re sum_n Q_{r,n} x_{t-1,n}) + B u_t      y_t = 2 Re sum_n C_n x_{t,n} + D u_t
/// A, B are discretised. With segments x_{t-1} is 0 where a document begins inside the row (a state passed in belongs
/// to the row's first document).
struct S4System {
  Tensor A, B, C;  // (h, n, 2), complex values as (re, im)
  Tensor D;        // (h) or undefined
  Tensor M, Q;     // (h, r, n, 2) or undefined
};
struct S4ScanOut { Tensor y, last; };
struct S4ScanGrad { Tensor du, dA, dB, dC, dD, dx0; };

/// u (b, l, h): fp32, bf16 or fp64; the system, x0 (b, h, n, 2; undefined: zeros) and `last` like it in fp32 (fp64 with
/// fp64 u). segments (b, l) int32 or undefined. y like u. On CUDA n <= 128.
S4ScanOut s4_scan_forward(const Tensor& u, const S4System& system, const Tensor& x0 = {}, const Tensor& segments = {});
/// Only without M and Q. dy or dlast may be undefined (zero). The states are computed again, in pieces, from every
/// 32nd: no tensor of all states. Sums over the batch have a fixed order.
S4ScanGrad s4_scan_backward(const Tensor& dy, const Tensor& dlast, const Tensor& u, const S4System& system,
                            const Tensor& x0 = {}, const Tensor& segments = {});

/// The same with dense real state matrices: x_t = A x_{t-1} + B u_t, y_t = C x_t + D u_t.
/// A (h, n, n), B (h, n), C (h, n), D (h) or undefined, x0 (b, h, n) or undefined. On CUDA n <= 1024.
S4ScanOut dense_scan_forward(const Tensor& u, const S4System& system, const Tensor& x0 = {},
                             const Tensor& segments = {});

// Backends: everything contiguous, u not empty, x0 and `last` the same size. In the backward dy, dlast and dx0 are
// there, and dA, dB, dC (b, h, n, 2) and dD (b, h) are one per sequence. Dense: A transposed, (h, column, row).
KRAIT_BACKENDS(void s4_scan_forward(Tensor& y, Tensor& last, const Tensor& u, const S4System& s, const Tensor& x0,
                                    const Tensor& segments);
               void s4_scan_backward(S4ScanGrad& grad, const Tensor& dy, const Tensor& dlast, const Tensor& u,
                                     const S4System& s, const Tensor& x0, const Tensor& segments);
               void dense_scan_forward(Tensor& y, Tensor& last, const Tensor& u, const S4System& s, const Tensor& x0,
                                       const Tensor& segments))

}  // namespace kernels
}  // namespace krait

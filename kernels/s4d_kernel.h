#pragma once
#include <cstdint>

#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// How x' = A x + B u becomes x_k = A_bar x_{k-1} + B_bar u_k with the time step dt (S4D, Gu et al. 2022, section 3.1):
///   zoh       A_bar = e^(dt A)                         B_bar = A^-1 (A_bar - I) B
///   bilinear  A_bar = (I - dt A/2)^-1 (I + dt A/2)     B_bar = (I - dt A/2)^-1 dt B
///   euler     A_bar = I + dt A                         B_bar = dt B
enum class Discretization : uint8_t { zoh, bilinear, euler };

/// The convolution kernel of diagonal state-space models, one per channel (S4D, eq. 5, 6):
///   dt = e^log_dt    A = -e^log_A_re + i A_im    K[h, l] = 2 Re sum_n C[h, n] B_bar[h, n] A_bar[h, n]^l
/// n counts one of each pair of complex conjugate states. A and B come in s sets: channel j uses set j / (h / s).
struct S4dParameters {
  Tensor log_dt;          // (h)
  Tensor log_A_re, A_im;  // (s, n)
  Tensor B;               // (s, n, 2)
  Tensor C;               // (h, n, 2)
};

/// fp32 or fp64, complex values as (re, im); zoh or bilinear. A_bar^l comes from the exponential at the start of every
/// tile of l, its argument in double, and from products inside the tile. K (h, length).
Tensor s4d_kernel_forward(const S4dParameters& p, int64_t length, Discretization discretization);
/// The gradients of the parameters, in the same struct; dK (h, length). Sums over l and over the channels of a set run
/// in a fixed order. Gradients of complex values are (d/dre, d/dim).
S4dParameters s4d_kernel_backward(const Tensor& dK, const S4dParameters& p, Discretization discretization);

// Backends: not empty, contiguous. contributions: see kernels/ssm_gradients.h.
KRAIT_BACKENDS(void s4d_kernel_forward(Tensor& K, const S4dParameters& p, bool zoh);
               void s4d_kernel_backward(Tensor& dC, Tensor& contributions, const Tensor& dK, const S4dParameters& p,
                                        bool zoh))

}  // namespace kernels
}  // namespace krait

#pragma once
#include <string>

#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// Long convolution along the sequence, one kernel per channel (S4, Gu et al. 2022, eq. 4-5; spec/s4.md section 6):
///   y[b,t,c] = sum_{s<=t} K[c,t-s] u[b,s,c] + sum_{s>t} K1[c,s-t-1] u[b,s,c] + D[c] u[b,t,c]
/// K1 (the reverse kernel, from lag 1) and D are optional. With segments s and t must be of the same document.
/// K and K1 may have any length: entries beyond l are not used, missing ones are zero.
/// Backward: du is the same sum with the roles of s and t exchanged, dK[c,m] = sum_{b,t} dy[b,t,c] u[b,t-m,c],
///   dK1[c,m] = sum_{b,t} dy[b,t,c] u[b,t+m+1,c] and dD[c] = dK[c,0].
///
/// With n the power of two >= l, sequences are polynomials modulo x^n - i: their product is
/// (coefficients 0..n-1) + i (coefficients n..2n-1) of the product without wrapping, so a complex transform of length
/// n serves what otherwise takes a real one of length 2n, and the reverse kernel is -i K1[n-1-m] x^m: no extra cost.
/// The transform splits x^n - w^2 = (x^{n/2} - w)(x^{n/2} + w); its order of points is bit-reversed and never undone.
///
/// u (b, l, h): fp32, bf16 or fp64. K (h, lk), K1 (h, lk1), D (h): fp32 (fp64 with fp64 u). Sums in fp32 (fp64).
/// segments (b, l) int32, ascending in each row. y like u. Sums over the batch have a fixed order: equal inputs give
/// equal bits, on the CPU with any number of threads.
Tensor fft_conv_forward(const Tensor& u, const Tensor& K, const Tensor& K1 = {}, const Tensor& D = {},
                        const Tensor& segments = {});

/// Undefined for what the forward did not have. dK, dK1, dD in the dtype of K.
struct FftConvGrad { Tensor du, dK, dK1, dD; };
FftConvGrad fft_conv_backward(const Tensor& dy, const Tensor& u, const Tensor& K, const Tensor& K1 = {},
                              const Tensor& D = {}, const Tensor& segments = {});

/// Which implementation serves a length.
std::string fft_conv_kernel_name(int64_t length, DType dtype, Device device, bool has_segments);

/// log2 of the transform that serves l positions.
inline int fft_conv_log2(int64_t l) {
  int k = 0;
  while ((int64_t{1} << k) < l) ++k;
  return k;
}

// Backends: everything contiguous, nothing empty; K, K1, D in the dtype of sums; K1, D, segments may be undefined.
// The backward fills dK and, where K1 is there, dK1 completely.
KRAIT_BACKENDS(void fft_conv_forward(Tensor& y, const Tensor& u, const Tensor& K, const Tensor& K1, const Tensor& D,
                                     const Tensor& segments);
               void fft_conv_backward(Tensor& du, Tensor& dK, Tensor& dK1, const Tensor& dy, const Tensor& u,
                                      const Tensor& K, const Tensor& K1, const Tensor& D, const Tensor& segments);
               void fft_conv_kernel_name(std::string& name, int64_t length, DType dtype, bool has_segments))

}  // namespace kernels
}  // namespace krait

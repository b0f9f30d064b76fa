#pragma once
// Complex FFT of power-of-two length in shared memory, by all threads of a block (any block size).
// forward: natural order in, bit-reversed order out; inverse: bit-reversed in, natural out; so a convolution needs no
// reordering. Nothing is divided by n: inverse(forward(x)) = n x.
#include <cstdint>

#include "kernels/complex.h"

namespace krait::kernels::cuda {

__device__ __forceinline__ void sin_cos_pi(float x, float* s, float* c) { sincospif(x, s, c); }
__device__ __forceinline__ void sin_cos_pi(double x, double* s, double* c) { sincospi(x, s, c); }

/// e^(-2 pi i k / n)
template <class T>
__device__ __forceinline__ Complex<T> root_of_unity(int64_t k, int64_t n) {
  Complex<T> w;
  sin_cos_pi(static_cast<T>(-2) * static_cast<T>(k) / static_cast<T>(n), &w.im, &w.re);
  return w;
}

/// Position in bit-reversed order of element k of n = 2^log2n.
__device__ __forceinline__ uint32_t bit_reversed(uint32_t k, int log2n) { return log2n ? __brev(k) >> (32 - log2n) : 0u; }

/// w[k] = e^(-2 pi i k / n), k < n/2. Ends with a barrier.
template <class T>
__device__ void fft_twiddles(Complex<T>* w, int log2n) {
  const int n = 1 << log2n;
  for (int k = threadIdx.x; k < n / 2; k += blockDim.x) w[k] = root_of_unity<T>(k, n);
  __syncthreads();
}

/// X_k = sum_t x_t e^(-2 pi i k t / n), at bit_reversed(k). w: fft_twiddles of the same n. The block's writes to x
/// must be complete (a barrier) before the call; it ends with one.
template <class T>
__device__ void fft_forward(Complex<T>* x, const Complex<T>* w, int log2n) {
  const int n = 1 << log2n;
  int log2m = log2n;
  for (; log2m >= 2; log2m -= 2) {  // two radix-2 stages at once: transforms of length m = 2^log2m
    const int quarter = 1 << (log2m - 2), stride = n >> log2m;
    for (int i = threadIdx.x; i < n / 4; i += blockDim.x) {
      const int j = i & (quarter - 1), at = ((i - j) << 2) + j;
      const Complex<T> a = x[at], b = x[at + quarter], c = x[at + 2 * quarter], d = x[at + 3 * quarter];
      const Complex<T> w1 = w[j * stride], w2 = w[2 * j * stride], w3 = w1 * w2;
      const Complex<T> p = a + c, q = b + d, m = a - c, r = times_i(b - d);
      x[at] = p + q;
      x[at + quarter] = (p - q) * w2;
      x[at + 2 * quarter] = (m - r) * w1;
      x[at + 3 * quarter] = (m + r) * w3;
    }
    __syncthreads();
  }
  if (log2m == 1) {
    for (int i = threadIdx.x; i < n / 2; i += blockDim.x) {
      const Complex<T> a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a + b;
      x[2 * i + 1] = a - b;
    }
    __syncthreads();
  }
}

/// x_t = sum_k X_k e^(2 pi i k t / n) with X_k at bit_reversed(k); the same rules.
template <class T>
__device__ void fft_inverse(Complex<T>* x, const Complex<T>* w, int log2n) {
  const int n = 1 << log2n;
  int log2m = 2;
  if (log2n & 1) {
    for (int i = threadIdx.x; i < n / 2; i += blockDim.x) {
      const Complex<T> a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a + b;
      x[2 * i + 1] = a - b;
    }
    __syncthreads();
    log2m = 3;
  }
  for (; log2m <= log2n; log2m += 2) {
    const int quarter = 1 << (log2m - 2), stride = n >> log2m;
    for (int i = threadIdx.x; i < n / 4; i += blockDim.x) {
      const int j = i & (quarter - 1), at = ((i - j) << 2) + j;
      const Complex<T> w1 = conj(w[j * stride]), w2 = conj(w[2 * j * stride]), w3 = w1 * w2;
      const Complex<T> p = x[at], q = x[at + quarter] * w2;
      const Complex<T> u = x[at + 2 * quarter] * w1, v = x[at + 3 * quarter] * w3;
      const Complex<T> s0 = p + q, s1 = p - q, d0 = u + v, d1 = times_i(u - v);
      x[at] = s0 + d0;
      x[at + quarter] = s1 + d1;
      x[at + 2 * quarter] = s0 - d0;
      x[at + 3 * quarter] = s1 - d1;
    }
    __syncthreads();
  }
}

}  // namespace krait::kernels::cuda

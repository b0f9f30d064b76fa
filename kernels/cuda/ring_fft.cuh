#pragma once
// Transform of polynomials modulo x^n - i (see kernels/fft_conv.h; the same tree of factors as cpu/ring_fft.h) in
// shared memory, by all threads of a block. Real and imaginary parts lie apart; positions are padded so that the
// small strides of the last levels spread over the banks.
#include "kernels/cuda/fft.cuh"

namespace krait::kernels::cuda {

/// Where position i of a row lies.
template <class A>
__host__ __device__ __forceinline__ int ring_at(int i) {
  return i + (i >> (sizeof(A) == 4 ? 5 : 4));
}
/// Between the rows of two channels: a little off a multiple of the banks.
template <class A>
__host__ __device__ __forceinline__ int ring_stride(int log2n) {
  return ring_at<A>(1 << log2n) + 4;
}

/// Square root of the factor of node q, which splits x^k - w^2 at w = root^2: node 2^j + m has the angle
/// (2^(-j-3) + bitrev_j(m) / 2^(j+1)) turns, its root half of that.
template <class A>
__global__ void ring_table_kernel(Complex<A>* table, int64_t size) {
  const int64_t q = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (q >= size) return;
  if (q == 0) {
    table[0] = {A(1), A(0)};
    return;
  }
  const int j = 31 - __clz(static_cast<int>(q));
  const uint32_t m = static_cast<uint32_t>(q) - (1u << j);
  double turns = exp2(static_cast<double>(-j - 3));
  if (j > 0) turns += static_cast<double>(__brev(m) >> (32 - j)) * exp2(static_cast<double>(-j - 1));
  double s, c;
  sincospi(turns, &s, &c);
  table[q] = {static_cast<A>(c), static_cast<A>(s)};
}

/// Two levels: p[0..3] become the values modulo the four factors; r is the node's table entry.
template <class A>
__device__ __forceinline__ void ring_split4(Complex<A> (&p)[4], Complex<A> r) {
  const Complex<A> w1 = r * r;
  const Complex<A> b = r * p[1], c = w1 * p[2], d = (w1 * r) * p[3];
  const Complex<A> s = p[0] + c, t = p[0] - c, e = b + d, f = times_i(b - d);
  p[0] = s + e;
  p[1] = s - e;
  p[2] = t + f;
  p[3] = t - f;
}
/// Undoes ring_split4, times 4.
template <class A>
__device__ __forceinline__ void ring_join4(Complex<A> (&p)[4], Complex<A> r) {
  const Complex<A> w1 = r * r;
  const Complex<A> s = p[0] + p[1], e = p[0] - p[1], t = p[2] + p[3], f = times_i(p[2] - p[3]);
  p[0] = s + t;
  p[1] = conj(r) * (e - f);
  p[2] = conj(w1) * (s - t);
  p[3] = conj(w1 * r) * (e + f);
}

/// One pass over blocks of 2^log2s values: op(p, m) changes the four values a quarter apart in block m of a row.
template <class A, class Op>
__device__ __forceinline__ void ring_pass4(A* re, A* im, int rows, int log2n, int log2s, Op op) {
  const int stride = ring_stride<A>(log2n), s = 1 << (log2s - 2), quarter = 1 << (log2n - 2);
  for (int i = threadIdx.x; i < rows * quarter; i += blockDim.x) {
    const int base = (i >> (log2n - 2)) * stride, in_row = i & (quarter - 1);
    const int m = in_row >> (log2s - 2), at = (m << log2s) + (in_row & (s - 1));
    Complex<A> p[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int x = base + ring_at<A>(at + j * s);
      p[j] = {re[x], im[x]};
    }
    op(p, m);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int x = base + ring_at<A>(at + j * s);
      re[x] = p[j].re;
      im[x] = p[j].im;
    }
  }
  __syncthreads();
}

/// Rows of 2^log2n values, `rows` of them ring_stride apart, each the polynomial of node q0. The block's writes must
/// be complete (a barrier) before the call; it ends with one.
template <class A>
__device__ void ring_forward(A* re, A* im, int rows, int log2n, int q0, const Complex<A>* __restrict__ table) {
  const int stride = ring_stride<A>(log2n);
  int log2s = log2n, nodes = 1;
  if (log2n & 1) {
    const int half = 1 << (log2n - 1);
    const Complex<A> r = table[q0], w = r * r;
    for (int i = threadIdx.x; i < rows * half; i += blockDim.x) {
      const int base = (i >> (log2n - 1)) * stride, k = i & (half - 1);
      const int x = base + ring_at<A>(k), y = base + ring_at<A>(k + half);
      const Complex<A> a{re[x], im[x]}, b = w * Complex<A>{re[y], im[y]};
      re[x] = a.re + b.re;
      im[x] = a.im + b.im;
      re[y] = a.re - b.re;
      im[y] = a.im - b.im;
    }
    __syncthreads();
    --log2s;
    nodes = 2;
  }
  for (; log2s >= 2; log2s -= 2, nodes *= 4)
    ring_pass4(re, im, rows, log2n, log2s, [&](Complex<A>(&p)[4], int m) { ring_split4(p, table[q0 * nodes + m]); });
}

/// Undoes ring_forward, times 2^log2n; the same rules.
template <class A>
__device__ void ring_inverse(A* re, A* im, int rows, int log2n, int q0, const Complex<A>* __restrict__ table) {
  const int stride = ring_stride<A>(log2n);
  for (int log2s = 2; log2s <= log2n; log2s += 2) {
    const int nodes = 1 << (log2n - log2s);
    ring_pass4(re, im, rows, log2n, log2s, [&](Complex<A>(&p)[4], int m) { ring_join4(p, table[q0 * nodes + m]); });
  }
  if (log2n & 1) {
    const int half = 1 << (log2n - 1);
    const Complex<A> r = table[q0], w = conj(r * r);
    for (int i = threadIdx.x; i < rows * half; i += blockDim.x) {
      const int base = (i >> (log2n - 1)) * stride, k = i & (half - 1);
      const int x = base + ring_at<A>(k), y = base + ring_at<A>(k + half);
      const Complex<A> a{re[x], im[x]}, b{re[y], im[y]}, d = w * (a - b);
      re[x] = a.re + b.re;
      im[x] = a.im + b.im;
      re[y] = d.re;
      im[y] = d.im;
    }
    __syncthreads();
  }
}

}  // namespace krait::kernels::cuda

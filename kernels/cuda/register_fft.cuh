#pragma once
// The transform modulo x^n - i of kernels/fft_conv.h with n = 1024 = 32 x 32, in registers: a sequence lies over 32
// threads of 32 values. Thread i first holds the coefficients i + 32 j and splits them into 32 blocks x^32 - w at
// nodes that are the same for all threads (constants); after one exchange thread m holds block m and splits it into
// its 32 points.
#include <cmath>

#include "kernels/complex.h"

namespace krait::kernels::cuda {

constexpr int kRegisterLog2 = 10;
constexpr int kSide = 32;

// sin and cos of 2 pi turns by their series, |turns| < 1.
constexpr double turn_series(double x, double term, int k) {
  double sum = term;
  for (; k < 60; k += 2) {
    term *= -x * x / (static_cast<double>(k) * (k + 1));
    sum += term;
  }
  return sum;
}
constexpr double kTwoPi = 6.283185307179586476925;
constexpr double turn_sine(double turns) { return turn_series(kTwoPi * turns, kTwoPi * turns, 2); }
constexpr double turn_cosine(double turns) { return turn_series(kTwoPi * turns, 1.0, 1); }

/// Node q = 2^j + m splits x^(2k) - w^2 into x^k - w (node 2q) and x^k + w (node 2q + 1): the angle of w in turns,
/// 2^(-j-3) + bitrev_j(m) / 2^(j+1).
KRAIT_HOST_DEVICE constexpr double node_turns(int q) {
  double own = 0.125, turns = 0, bit = 0.25;
  for (; q > 1; q >>= 1) {
    if (q & 1) turns += bit;
    bit *= 0.5;
    own *= 0.5;
  }
  return own + turns;
}

/// The upper nodes 1..31.
struct FirstRoots {
  template <int q>
  struct Root {
    static constexpr float re = static_cast<float>(turn_cosine(node_turns(q)));
    static constexpr float im = static_cast<float>(turn_sine(node_turns(q)));
  };
  template <int q>
  __device__ __forceinline__ Complex<float> at() const {
    return {Root<q>::re, Root<q>::im};
  }
};

/// The nodes below block m: node q of its own subtree (1..31) is node (32 + m) 2^j + s of the tree, q = 2^j + s.
/// table (32, 32): [q][m].
struct BlockRoots {
  const Complex<float>* of_block;  // table + m
  template <int q>
  __device__ __forceinline__ Complex<float> at() const {
    const float2 v = __ldg(reinterpret_cast<const float2*>(of_block + q * kSide));
    return {v.x, v.y};
  }
};
/// Entry i of BlockRoots' table.
KRAIT_HOST_DEVICE constexpr int node_of_entry(int i) {
  int q = i / kSide, high = 1;
  while (2 * high <= q) high *= 2;
  return (kSide + i % kSide) * high + (q - high);
}

/// Coefficients to values, from node q down; six multiply-adds for a pair.
template <int q, int size, class Roots>
__device__ __forceinline__ void register_split(Complex<float>* p, const Roots& roots) {
  if constexpr (size > 1) {
    constexpr int half = size / 2;
    const Complex<float> w = roots.template at<q>();
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const Complex<float> a = p[k], b = p[k + half];
      const Complex<float> s{fmaf(-w.im, b.im, fmaf(w.re, b.re, a.re)), fmaf(w.im, b.re, fmaf(w.re, b.im, a.im))};
      p[k] = s;
      p[k + half] = {fmaf(2.0f, a.re, -s.re), fmaf(2.0f, a.im, -s.im)};
    }
    register_split<2 * q, half>(p, roots);
    register_split<2 * q + 1, half>(p + half, roots);
  }
}

/// Of real coefficients (imaginary parts are not read): the first 32 blocks.
__device__ __forceinline__ void register_split_real(Complex<float>* p) {
  constexpr int half = kSide / 2;
  constexpr FirstRoots roots;
  const Complex<float> w = roots.at<1>();
#pragma unroll
  for (int k = 0; k < half; ++k) {
    const float a = p[k].re, b = p[k + half].re;
    p[k] = {fmaf(w.re, b, a), w.im * b};
    p[k + half] = {fmaf(-w.re, b, a), -w.im * b};
  }
  register_split<2, half>(p, roots);
  register_split<3, half>(p + half, roots);
}

/// Undoes register_split, times size.
template <int q, int size, class Roots>
__device__ __forceinline__ void register_join(Complex<float>* p, const Roots& roots) {
  if constexpr (size > 1) {
    constexpr int half = size / 2;
    register_join<2 * q, half>(p, roots);
    register_join<2 * q + 1, half>(p + half, roots);
    const Complex<float> w = roots.template at<q>();
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const Complex<float> a = p[k], b = p[k + half], d = a - b;
      p[k] = a + b;
      p[k + half] = {fmaf(w.im, d.im, w.re * d.re), fmaf(w.re, d.im, -w.im * d.re)};
    }
  }
}

/// The upper 32 blocks joined; only the real parts of the coefficients are made.
__device__ __forceinline__ void register_join_real(Complex<float>* p) {
  constexpr int half = kSide / 2;
  constexpr FirstRoots roots;
  register_join<2, half>(p, roots);
  register_join<3, half>(p + half, roots);
  const Complex<float> w = roots.at<1>();
#pragma unroll
  for (int k = 0; k < half; ++k) {
    const Complex<float> a = p[k], b = p[k + half];
    p[k].re = a.re + b.re;
    p[k + half].re = fmaf(w.im, a.im - b.im, w.re * (a.re - b.re));
  }
}

}  // namespace krait::kernels::cuda

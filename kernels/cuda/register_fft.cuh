#pragma once
// The transform modulo x^n - i of kernels/fft_conv.h in registers: a sequence lies over n / 32 threads of 32 values.
// A pass splits (or joins) log2(size) levels of the tree of factors without an exchange; the first pass is at nodes
// that are the same for all threads (constants), later ones read the nodes of their blocks from a table.
#include "kernels/complex.h"

namespace krait::kernels::cuda {

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

/// The nodes from the root down.
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

/// The nodes below block m of `blocks`: node q of its own subtree is node (blocks + m) 2^j + s of the tree,
/// q = 2^j + s. table (size, blocks): [q][m]. Early: the loads may move up past the exchange, which hides them where all
/// of a subtree's roots at once fit in registers; else they stay behind it.
template <int blocks, bool early>
struct BlockRoots {
  const Complex<float>* of_block;  // table + m
  template <int q>
  __device__ __forceinline__ Complex<float> at() const {
    if constexpr (early) {
      const float2 v = __ldg(reinterpret_cast<const float2*>(of_block + q * blocks));
      return {v.x, v.y};
    } else {
      return of_block[q * blocks];
    }
  }
};
/// The tree's node of entry i of that table.
KRAIT_HOST_DEVICE constexpr int node_of_entry(int i, int blocks) {
  int q = i / blocks, high = 1;
  while (2 * high <= q) high *= 2;
  return (blocks + i % blocks) * high + (q - high);
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

/// The first pass of real coefficients: imaginary parts are not read.
template <int size>
__device__ __forceinline__ void register_split_real(Complex<float>* p) {
  constexpr int half = size / 2;
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

/// Undoes the first pass; only the real parts of the coefficients are made.
template <int size>
__device__ __forceinline__ void register_join_real(Complex<float>* p) {
  constexpr int half = size / 2;
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

// How a transform lies over its threads. Before the first pass value kRadix s + j of thread i is coefficient
// i + kThreads s + kStep j; behind the last one its points are the thread's own.
constexpr int kValues = 32;  // of a thread

/// 1024 = 32 x 32. Block m of 32 coefficients lies in a line of 33 in shared memory.
struct Plan1024 {
  static constexpr int kLog2 = 10, kPoints = 1024, kThreads = 32, kRadix = 32, kStep = 32;
  static constexpr int kChannels = 8;            // of a block of threads: a sector of each position
  static constexpr int kShared = 32 * 33 + 4;    // floats of a channel: 8 channels x 4 coefficients in 32 banks
  static constexpr int kTable = 32 * 32;
  KRAIT_HOST_DEVICE static int node(int entry) { return node_of_entry(entry, 32); }

  /// Where element e of thread i lies in the exchange: before (coefficients) and behind it.
  KRAIT_HOST_DEVICE static int upper(int i, int e) { return e * 33 + i; }
  KRAIT_HOST_DEVICE static int lower(int i, int e) { return i * 33 + e; }
  template <bool early, class Exchange>
  __device__ __forceinline__ static void split_rest(Complex<float>* v, const Complex<float>* table, int i, Exchange) {
    register_split<1, 32>(v, BlockRoots<32, early>{table + i});
  }
  template <bool early, class Exchange>
  __device__ __forceinline__ static void join_rest(Complex<float>* v, const Complex<float>* table, int i, Exchange) {
    register_join<1, 32>(v, BlockRoots<32, early>{table + i});
  }
};

/// 4096 = 16 x 16 x 16, two columns a thread. Block m of 256 coefficients lies in 272 places, its blocks of 16 in lines
/// of 17 after the second pass, which 16 neighbouring threads exchange among themselves.
struct Plan4096 {
  static constexpr int kLog2 = 12, kPoints = 4096, kThreads = 128, kRadix = 16, kStep = 256;
  static constexpr int kChannels = 4;
  static constexpr int kShared = 16 * 272 + 8;  // 4 channels x 8 coefficients in 32 banks
  static constexpr int kTable = 16 * 16 + 16 * 256;
  KRAIT_HOST_DEVICE static int node(int entry) {
    return entry < 16 * 16 ? node_of_entry(entry, 16) : node_of_entry(entry - 16 * 16, 256);
  }
  KRAIT_HOST_DEVICE static int upper(int i, int e) { return e % 16 * 272 + i + 128 * (e / 16); }
  KRAIT_HOST_DEVICE static int lower(int i, int e) { return (i / 16 + 8 * (e / 16)) * 272 + i % 16 + 16 * (e % 16); }
  // The second exchange, as types.
  struct Columns {
    KRAIT_HOST_DEVICE int operator()(int i, int e) const { return (i / 16 + 8 * (e / 16)) * 272 + e % 16 * 17 + i % 16; }
  };
  struct Lines {
    KRAIT_HOST_DEVICE int operator()(int i, int e) const { return (i / 16 + 8 * (e / 16)) * 272 + i % 16 * 17 + e % 16; }
  };
  /// exchange(from, to) moves element e of thread i from place from(i, e) to its element at to(i, e), inside warps.
  template <bool early, class Exchange>
  __device__ __forceinline__ static void split_rest(Complex<float>* v, const Complex<float>* table, int i,
                                                    Exchange exchange) {
    register_split<1, 16>(v, BlockRoots<16, early>{table + i / 16});
    register_split<1, 16>(v + 16, BlockRoots<16, early>{table + i / 16 + 8});
    exchange(Columns{}, Lines{});
    register_split<1, 16>(v, BlockRoots<256, early>{table + 256 + i});
    register_split<1, 16>(v + 16, BlockRoots<256, early>{table + 256 + i + 128});
  }
  template <bool early, class Exchange>
  __device__ __forceinline__ static void join_rest(Complex<float>* v, const Complex<float>* table, int i,
                                                   Exchange exchange) {
    register_join<1, 16>(v, BlockRoots<256, early>{table + 256 + i});
    register_join<1, 16>(v + 16, BlockRoots<256, early>{table + 256 + i + 128});
    exchange(Lines{}, Columns{});
    register_join<1, 16>(v, BlockRoots<16, early>{table + i / 16});
    register_join<1, 16>(v + 16, BlockRoots<16, early>{table + i / 16 + 8});
  }
};

}  // namespace krait::kernels::cuda

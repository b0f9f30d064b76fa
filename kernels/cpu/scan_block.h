#pragma once
// The selective scan on the CPU works on blocks of kBlock channels (the last one filled up with zeros, which change
// nothing); states of a block lie as (n, kBlock): every inner loop runs over kBlock neighbouring channels and becomes
// vector code.
#include <algorithm>

#include "kernels/cpu/put.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/selective_scan.h"

namespace krait::kernels::cpu::scan {

inline constexpr int64_t kBlock = 32;
inline constexpr int64_t kQ = kScanChunk;  // from one kept state to the next

template <class A>
using Row = A[kBlock];

template <class T, class A>
void load_row(A* __restrict to, const T* __restrict from, int64_t count) {
  if (count == kBlock) {
#pragma omp simd
    for (int64_t j = 0; j < kBlock; ++j) to[j] = static_cast<A>(from[j]);
  } else {
    for (int64_t j = 0; j < kBlock; ++j) to[j] = j < count ? static_cast<A>(from[j]) : A(0);
  }
}

template <class T, class A>
void store_row(T* __restrict to, const A* __restrict from, int64_t count) {
  if (count == kBlock) {
#pragma omp simd
    for (int64_t j = 0; j < kBlock; ++j) put(to[j], from[j]);
  } else {
    for (int64_t j = 0; j < count; ++j) put(to[j], from[j]);
  }
}

template <class T, class A>
void load_states(A* __restrict to, const T* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(from[i]);
}

// delta = softplus(dt + bias), and delta x. Padded channels get 0.
template <class A>
void discretise(A* __restrict delta, A* __restrict dx, const A* __restrict raw, const A* __restrict bias,
                const A* __restrict x, bool softplus, int64_t count) {
  if (softplus) {
#pragma omp simd
    for (int64_t j = 0; j < kBlock; ++j) delta[j] = vsoftplus(raw[j] + bias[j]);
    for (int64_t j = count; j < kBlock; ++j) delta[j] = A(0);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < kBlock; ++j) delta[j] = raw[j] + bias[j];
  }
#pragma omp simd
  for (int64_t j = 0; j < kBlock; ++j) dx[j] = delta[j] * x[j];
}

// (e, n) of one batch row or of A to the block's (n, kBlock), and back.
template <class A>
void load_block(A* to, const A* from, int64_t n, int64_t count) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < kBlock; ++j) to[i * kBlock + j] = j < count ? from[j * n + i] : A(0);
}
template <class A>
void store_block(A* to, const A* from, int64_t n, int64_t count) {
  for (int64_t j = 0; j < count; ++j)
    for (int64_t i = 0; i < n; ++i) to[j * n + i] = from[i * kBlock + j];
}

// One block of channels of one batch row.
template <class T, class A = accum_t<T>>
struct Channels {
  Channels(const SelectiveScanInputs& in, int64_t row, int64_t block)
      : l(in.x.size(1)), e(in.x.size(2)), n(in.A.size(1)), at(block * kBlock), count(std::min(kBlock, e - at)),
        x(in.x.data<T>() + row * in.x.stride(0) + at), dt(in.dt.data<T>() + row * in.dt.stride(0) + at),
        z(in.z.defined() ? in.z.data<T>() + row * in.z.stride(0) + at : nullptr),
        b(in.B.data<T>() + row * in.B.stride(0)), c(in.C.data<T>() + row * in.C.stride(0)),
        x_row(in.x.stride(1)), dt_row(in.dt.stride(1)), z_row(in.z.defined() ? in.z.stride(1) : 0),
        b_row(in.B.stride(1)), c_row(in.C.stride(1)),
        segments(in.segments.defined() ? in.segments.data<int32_t>() + row * l : nullptr), softplus(in.softplus) {
    const A nothing[kBlock] = {};
    load_row(d, in.D.defined() ? in.D.data<A>() + at : nothing, count);
    load_row(bias, in.dt_bias.defined() ? in.dt_bias.data<A>() + at : nothing, count);
  }
  bool begins(int64_t t) const { return t > 0 && segments != nullptr && segments[t] != segments[t - 1]; }

  int64_t l, e, n, at, count;
  const T *x, *dt, *z, *b, *c;
  int64_t x_row, dt_row, z_row, b_row, c_row;
  const int32_t* segments;
  bool softplus;
  Row<A> d, bias;
};

inline int64_t blocks_of(int64_t e) { return (e + kBlock - 1) / kBlock; }

}  // namespace krait::kernels::cpu::scan

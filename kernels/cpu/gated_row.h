#pragma once
#include "kernels/cpu/norm.h"
#include "kernels/cpu/vector_math.h"

// Rows of the gated norms, whose whole groups are here (gated_rms_norm.cpp) or with several ranks (_split.cpp).
namespace krait::kernels::cpu {

template <class T, class A>
void gate_row(A* __restrict s, const T* __restrict z, int64_t e) {
#pragma omp simd
  for (int64_t j = 0; j < e; ++j) s[j] = vsilu(static_cast<A>(z[j]));
}

// silu(z) and its slope, of one row.
template <class T, class A>
void gate_rows(A* __restrict s, A* __restrict slope, const T* __restrict z, int64_t e) {
#pragma omp simd
  for (int64_t j = 0; j < e; ++j) {
    const ValueAndSlope<A> at = vsilu_and_slope(static_cast<A>(z[j]));
    s[j] = at.value;
    slope[j] = at.slope;
  }
}

template <class T, class A>
void write_again(T* __restrict y, const T* __restrict x, const A* __restrict s, const A* __restrict w, A rstd, int64_t c) {
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) put(y[j], static_cast<A>(x[j]) * s[j] * rstd * w[j]);
}

// dx and dz of one group, whose mean of w dv vhat is known; adds its part to dw.
template <bool kNormFirst, class T, class A>
void write_gradient(T* __restrict dx, T* __restrict dz, A* __restrict dw, const T* __restrict dy, const T* __restrict x,
                    const A* __restrict s, const A* __restrict slope, const A* __restrict w, A rstd, A mean, int64_t c) {
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) {
    const A up = static_cast<A>(dy[j]), v = static_cast<A>(x[j]);
    const A t = kNormFirst ? up * s[j] : up, vhat = (kNormFirst ? v : v * s[j]) * rstd;
    const A dv = rstd * (t * w[j] - vhat * mean);
    dw[j] += t * vhat;
    put(dx[j], kNormFirst ? dv : dv * s[j]);
    put(dz[j], (kNormFirst ? up * vhat * w[j] : dv * v) * slope[j]);
  }
}

}  // namespace krait::kernels::cpu

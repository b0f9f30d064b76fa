#include "kernels/rope.h"

#include <algorithm>

#include "core/parallel.h"
#include "kernels/cpu/put.h"

namespace krait::kernels::cpu {

namespace {

int64_t position_at(const Tensor& positions, int64_t b, int64_t l) {
  const int64_t i = b * positions.stride(0) + l * positions.stride(1);
  return positions.dtype() == DType::i64 ? positions.data<int64_t>()[i] : positions.data<int32_t>()[i];
}

// Both allow y to be x: a pair is read before it is written.
template <class T, class A>
void rotate_half(T* y, const T* x, const A* cos, const A* sin, A sign, int64_t half) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const A a = static_cast<A>(x[i]), b = static_cast<A>(x[i + half]), s = sign * sin[i];
    put(y[i], a * cos[i] - b * s);
    put(y[i + half], a * s + b * cos[i]);
  }
}

template <class T, class A>
void rotate_interleaved(T* y, const T* x, const A* cos, const A* sin, A sign, int64_t half) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const A a = static_cast<A>(x[2 * i]), b = static_cast<A>(x[2 * i + 1]), s = sign * sin[i];
    put(y[2 * i], a * cos[i] - b * s);
    put(y[2 * i + 1], a * s + b * cos[i]);
  }
}

}  // namespace

void rope(Tensor& y_out, const Tensor& x_in, const Tensor& cos, const Tensor& sin, RopeStyle style,
          const Tensor& positions, int64_t offset, bool inverse) {
  const int64_t l = x_in.size(1), h = x_in.size(2), d = x_in.size(3), half = cos.size(1);
  visit_float(x_in.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const A sign = inverse ? A(-1) : A(1);
    T* y_all = y_out.data<T>();
    const T* x_all = x_in.data<T>();
    parallel_for(0, x_in.size(0) * l, std::max<int64_t>(1, 8192 / (h * d)), [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) {
        const int64_t ib = t / l, il = t % l;
        const int64_t p = offset + (positions.defined() ? position_at(positions, ib, il) : il);
        KRAIT_CHECK(p >= 0 && p < cos.size(0), "rope: position {} of ({}, {}) is outside the table of {}", p, ib, il,
                    cos.size(0));
        const A *c = cos.data<A>() + p * half, *s = sin.data<A>() + p * half;
        for (int64_t ih = 0; ih < h; ++ih) {
          const T* x = x_all + ib * x_in.stride(0) + il * x_in.stride(1) + ih * x_in.stride(2);
          T* y = y_all + ib * y_out.stride(0) + il * y_out.stride(1) + ih * y_out.stride(2);
          if (style == RopeStyle::half)
            rotate_half(y, x, c, s, sign, half);
          else
            rotate_interleaved(y, x, c, s, sign, half);
          if (y != x) std::copy(x + 2 * half, x + d, y + 2 * half);
        }
      }
    });
  });
}

void linear_rope(Tensor& y, const Gemm& product, const Tensor& bias, int64_t rotated, const Tensor& cos, const Tensor& sin,
                 RopeStyle style, int64_t offset) {
  Tensor flat = y.view({y.size(0) * y.size(1), y.size(2) * y.size(3)}), none, first = y.slice(2, 0, rotated);
  linear_forward(flat, none, product, bias, Epilogue::none);
  if (first.numel() > 0) rope(first, first, cos, sin, style, none, offset, false);
}

}  // namespace krait::kernels::cpu

#pragma once
#include "core/dtype.h"

namespace krait {
namespace kernels {

/// A complex number in memory as (re, im), for CPU and GPU code. T is float or double.
template <class T>
struct alignas(2 * sizeof(T)) Complex {
  T re, im;
};
template <class T>
KRAIT_HOST_DEVICE constexpr Complex<T> operator+(Complex<T> a, Complex<T> b) { return {a.re + b.re, a.im + b.im}; }
template <class T>
KRAIT_HOST_DEVICE constexpr Complex<T> operator-(Complex<T> a, Complex<T> b) { return {a.re - b.re, a.im - b.im}; }
template <class T>
KRAIT_HOST_DEVICE constexpr Complex<T> operator*(Complex<T> a, Complex<T> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class T>
KRAIT_HOST_DEVICE constexpr Complex<T> operator*(T a, Complex<T> b) { return {a * b.re, a * b.im}; }
template <class T>
KRAIT_HOST_DEVICE constexpr Complex<T> operator/(Complex<T> a, Complex<T> b) {
  const T scale = T(1) / (b.re * b.re + b.im * b.im);
  return {(a.re * b.re + a.im * b.im) * scale, (a.im * b.re - a.re * b.im) * scale};
}
template <class T>
KRAIT_HOST_DEVICE constexpr Complex<T> conj(Complex<T> a) { return {a.re, -a.im}; }
template <class T>
KRAIT_HOST_DEVICE constexpr Complex<T> times_i(Complex<T> a) { return {-a.im, a.re}; }
template <class T>
KRAIT_HOST_DEVICE constexpr T norm(Complex<T> a) { return a.re * a.re + a.im * a.im; }

using Complex64 = Complex<double>;

/// Element i of an array of (re, im) pairs, in double.
template <class T>
KRAIT_HOST_DEVICE inline Complex64 load_complex(const T* p, int64_t i) {
  return {static_cast<double>(p[2 * i]), static_cast<double>(p[2 * i + 1])};
}
template <class T>
KRAIT_HOST_DEVICE inline void store_complex(T* p, int64_t i, Complex64 v) {
  p[2 * i] = static_cast<T>(v.re);
  p[2 * i + 1] = static_cast<T>(v.im);
}

}  // namespace kernels
}  // namespace krait

#pragma once
// SiLU and its slope on vectors. The exponential takes eighths of a power of two from a register: the polynomial that is
// left is half as long as that of vector_math.h, whose loops know no tables.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/vector_math.h"

namespace krait::kernels::cpu {

/// f of every lane.
template <class A, class F>
[[gnu::always_inline]] inline Vec<A> each_lane(Vec<A> x, F f) {
  for (int i = 0; i < kLanes<A>; ++i) x[i] = f(x[i]);
  return x;
}

#if defined(__AVX2__)
namespace detail {

// GCC makes two instructions of a choice that keeps NaN; these are one. (GCC 12 warns about _mm512_max_ps itself.)
#if defined(__AVX512F__)
[[gnu::always_inline]] inline Vec<float> at_least(Vec<float> x, float low) {
  return (Vec<float>)_mm512_maskz_max_ps(0xffff, _mm512_set1_ps(low), (__m512)x);
}
[[gnu::always_inline]] inline Vec<float> at_most(Vec<float> x, float high) {
  return (Vec<float>)_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(high), (__m512)x);
}
#else
[[gnu::always_inline]] inline Vec<float> at_least(Vec<float> x, float low) {
  return (Vec<float>)_mm256_max_ps(_mm256_set1_ps(low), (__m256)x);
}
[[gnu::always_inline]] inline Vec<float> at_most(Vec<float> x, float high) {
  return (Vec<float>)_mm256_min_ps(_mm256_set1_ps(high), (__m256)x);
}
#endif

/// 1 + e^-x for -87 <= x <= 80: e^-x = 2^(n/8) e^-r, |r| <= ln 2 / 16.
[[gnu::always_inline]] inline Vec<float> one_plus_exp_minus(Vec<float> x) {
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  constexpr uint32_t k[] = {0x000000, 0x0b95c2, 0x1837f0, 0x25fed7, 0x3504f3, 0x45672a, 0x5744fd, 0x6ac0c7};  // 2^(j/8) - 1
  // A shuffle takes the low bits of an index.
#if defined(__AVX512F__)
  const Bits eighths{k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7], k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7]};
#else
  const Bits eighths{k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7]};
#endif
  constexpr float kRound = 12582912.0f + 8 * 127.0f;  // as in vector_math.h, in eighths
  const Vec<float> t = x * (8 * -1.44269504f) + kRound, m = kRound - t;
  Vec<float> r = m * -0x1.62e4p-4f + x;
  r = m * -0x1.7f7d1cp-23f + r;
  const Bits n = (Bits)t;
  const Vec<float> scale = (Vec<float>)(__builtin_shuffle(eighths, n) | ((n << 20) & 0xff800000u));
  const Vec<float> q = (r * -0x1.555556p-3f + 0x1.00087ep-1f) * r + -1.0f;  // (e^-r - 1) / r, minimax
  return (scale * r) * q + (scale + 1.0f);
}

}  // namespace detail

// Below -87 both are those of -87, -1e-36.
inline constexpr float kSiluLow = -87.0f, kSiluHigh = 80.0f;

[[gnu::always_inline]] inline Vec<float> vector_silu(Vec<float> x) {
  x = detail::at_least(x, kSiluLow);
  return x / detail::one_plus_exp_minus(detail::at_most(x, kSiluHigh));
}
[[gnu::always_inline]] inline Vec<float> vector_silu_slope(Vec<float> x) {
  x = detail::at_most(detail::at_least(x, kSiluLow), kSiluHigh);
  const Vec<float> s = 1.0f / detail::one_plus_exp_minus(x);
  return s * (x * (1.0f - s) + 1.0f);
}
#else
[[gnu::always_inline]] inline Vec<float> vector_silu(Vec<float> x) {
  return each_lane<float>(x, [](float v) { return vsilu(v); });
}
[[gnu::always_inline]] inline Vec<float> vector_silu_slope(Vec<float> x) {
  return each_lane<float>(x, [](float v) { return vsilu_and_slope(v).slope; });
}
#endif
[[gnu::always_inline]] inline Vec<double> vector_silu(Vec<double> x) {
  return each_lane<double>(x, [](double v) { return vsilu(v); });
}
[[gnu::always_inline]] inline Vec<double> vector_silu_slope(Vec<double> x) {
  return each_lane<double>(x, [](double v) { return vsilu_and_slope(v).slope; });
}

}  // namespace krait::kernels::cpu

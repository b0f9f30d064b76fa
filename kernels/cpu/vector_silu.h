#pragma once
// SiLU and its slope on vectors. The exponential takes eighths of a power of two from a register: the polynomial that is
// left is half as long as that of vector_math.h, whose loops know no tables. Several vectors go together, operation by
// operation: each is a chain of a dozen operations that wait for each other, and a processor does not look far enough ahead
// to find the next vectors' (Zen 3, four together: 3.1 ns a vector with the convolution in front, one by one 3.7).
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstring>

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/put.h"
#include "kernels/cpu/vector_math.h"

namespace krait::kernels::cpu {

namespace detail {

typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));

}  // namespace detail

/// A vector of values in the dtype of sums.
template <class A, class T>
[[gnu::always_inline]] inline Vec<A> widened(const T* p) {
  if constexpr (std::is_same_v<A, T>) {
    return load(p);
  } else {
    static_assert(std::is_same_v<A, float> && std::is_same_v<T, bf16>);
    detail::HalfBits v;
    std::memcpy(&v, p, sizeof v);
    return (Vec<float>)(__builtin_convertvector(v, detail::Bits) << 16);
  }
}

/// And back.
template <class A, class T>
[[gnu::always_inline]] inline void put_vector(T* to, Vec<A> v) {
  if constexpr (std::is_same_v<A, T>) {
    store(to, v);
  } else {  // as bf16 rounds a value
    static_assert(std::is_same_v<A, float> && std::is_same_v<T, bf16>);
    const detail::Bits u = (detail::Bits)v;
    const detail::Bits bits = v == v ? (u + 0x7fffu + ((u >> 16) & 1u)) >> 16 : (u >> 16) | 0x40u;
    const detail::HalfBits half = __builtin_convertvector(bits, detail::HalfBits);
    std::memcpy(static_cast<void*>(to), &half, sizeof half);
  }
}

namespace detail {

/// f(i) for i < N, unrolled.
template <size_t N, class F>
[[gnu::always_inline]] inline void each_index(F f) {
#pragma GCC unroll 8
  for (size_t i = 0; i < N; ++i) f(i);
}

}  // namespace detail

/// f of every value.
template <class V, size_t N, class F>
[[gnu::always_inline]] inline void each_value(V (&x)[N], F f) {
  for (V& v : x) {
    V y = v;
    for (size_t i = 0; i < sizeof(V) / sizeof(v[0]); ++i) y[i] = f(v[i]);
    v = y;
  }
}

namespace detail {

// GCC makes two instructions of a choice that keeps NaN; the first ones are one. (GCC 12 warns about _mm512_max_ps itself.)
#if defined(__AVX512F__)
[[gnu::always_inline]] inline Vec<float> at_least(Vec<float> x, float low) {
  return (Vec<float>)_mm512_maskz_max_ps(0xffff, _mm512_set1_ps(low), (__m512)x);
}
[[gnu::always_inline]] inline Vec<float> at_most(Vec<float> x, float high) {
  return (Vec<float>)_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(high), (__m512)x);
}
#elif defined(__AVX2__)
[[gnu::always_inline]] inline Vec<float> at_least(Vec<float> x, float low) {
  return (Vec<float>)_mm256_max_ps(_mm256_set1_ps(low), (__m256)x);
}
[[gnu::always_inline]] inline Vec<float> at_most(Vec<float> x, float high) {
  return (Vec<float>)_mm256_min_ps(_mm256_set1_ps(high), (__m256)x);
}
#else
[[gnu::always_inline]] inline Vec<float> at_least(Vec<float> x, float low) { return x < low ? Vec<float>{} + low : x; }
[[gnu::always_inline]] inline Vec<float> at_most(Vec<float> x, float high) { return x > high ? Vec<float>{} + high : x; }
#endif

}  // namespace detail

#if defined(__AVX2__)
namespace detail {

/// d = e^-x, or 1 + e^-x, for -87 <= x <= 80: e^-x = 2^((n + r) / 8), |r| <= 1/2. The product of x and 8 log2(e) is rounded in
/// neither sum; kSmall is what the constant lacks.
template <bool kPlusOne, size_t N>
[[gnu::always_inline]] inline void exp_minus(Vec<float> (&d)[N], const Vec<float> (&x)[N]) {
  // The bits of 2^(j/8) - 1, less those that j leaves in their place when n is shifted to the exponent.
  constexpr uint32_t k[] = {0x000000,             0x0b95c2 - 0x100000u, 0x1837f0 - 0x200000u, 0x25fed7 - 0x300000u,
                            0x3504f3 - 0x400000u, 0x45672a - 0x500000u, 0x5744fd - 0x600000u, 0x6ac0c7 - 0x700000u};
  // A shuffle takes the low bits of an index.
#if defined(__AVX512F__)
  const Bits eighths{k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7], k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7]};
#else
  const Bits eighths{k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7]};
#endif
  constexpr float kRound = 12582912.0f + 8 * 127.0f, kSteps = 8 * -1.44269504f, kSmall = -0x1.4ae0bfp-23f;  // as in vector_math.h, in eighths
  Vec<float> t[N], r[N], scale[N], q[N];
  each_index<N>([&](size_t i) { t[i] = x[i] * kSteps + kRound; });
  each_index<N>([&](size_t i) { r[i] = x[i] * kSteps - (t[i] - kRound); });
  each_index<N>([&](size_t i) { r[i] = x[i] * kSmall + r[i]; });
  each_index<N>([&](size_t i) { scale[i] = (Vec<float>)(__builtin_shuffle(eighths, (Bits)t[i]) + ((Bits)t[i] << 20)); });
  each_index<N>([&](size_t i) { q[i] = r[i] * 0x1.c6c000p-14f + 0x1.ec0c32p-9f; });  // (2^(r/8) - 1) / r, minimax
  each_index<N>([&](size_t i) { q[i] = q[i] * r[i] + 0x1.62e430p-4f; });
  each_index<N>([&](size_t i) { r[i] *= scale[i]; });
  each_index<N>([&](size_t i) { d[i] = r[i] * q[i] + (kPlusOne ? scale[i] + 1.0f : scale[i]); });
}

}  // namespace detail

// Below -87 both are those of -87, -1e-36.
inline constexpr float kSiluLow = -87.0f, kSiluHigh = 80.0f;

/// In place.
template <size_t N>
[[gnu::always_inline]] inline void vector_silu(Vec<float> (&x)[N]) {
  Vec<float> y[N], d[N];
  detail::each_index<N>([&](size_t i) { x[i] = detail::at_least(x[i], kSiluLow); });
  detail::each_index<N>([&](size_t i) { y[i] = detail::at_most(x[i], kSiluHigh); });
  detail::exp_minus<true>(d, y);
  detail::each_index<N>([&](size_t i) { x[i] /= d[i]; });
}
template <size_t N>
[[gnu::always_inline]] inline void vector_silu_slope(Vec<float> (&x)[N]) {
  Vec<float> s[N];
  detail::each_index<N>([&](size_t i) { x[i] = detail::at_most(detail::at_least(x[i], kSiluLow), kSiluHigh); });
  detail::exp_minus<true>(s, x);
  detail::each_index<N>([&](size_t i) { s[i] = 1.0f / s[i]; });
  detail::each_index<N>([&](size_t i) { x[i] = s[i] * (x[i] * (1.0f - s[i]) + 1.0f); });
}
/// x becomes the value, `slope` what vector_silu_slope gives.
template <size_t N>
[[gnu::always_inline]] inline void vector_silu_and_slope(Vec<float> (&x)[N], Vec<float> (&slope)[N]) {
  Vec<float> y[N], s[N];
  detail::each_index<N>([&](size_t i) { x[i] = detail::at_least(x[i], kSiluLow); });
  detail::each_index<N>([&](size_t i) { y[i] = detail::at_most(x[i], kSiluHigh); });
  detail::exp_minus<true>(s, y);
  detail::each_index<N>([&](size_t i) { s[i] = 1.0f / s[i]; });
  detail::each_index<N>([&](size_t i) { slope[i] = s[i] * (y[i] * (1.0f - s[i]) + 1.0f); });
  detail::each_index<N>([&](size_t i) { x[i] *= s[i]; });
}
/// 1 / (1 + e^-x); 0 below -87, 1 above 80.
template <size_t N>
[[gnu::always_inline]] inline void vector_sigmoid(Vec<float> (&x)[N]) {
  typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
  Vec<float> y[N], d[N];
  detail::each_index<N>([&](size_t i) { y[i] = detail::at_most(detail::at_least(x[i], kSiluLow), kSiluHigh); });
  detail::exp_minus<true>(d, y);
  detail::each_index<N>([&](size_t i) { x[i] = (Vec<float>)((Mask)(1.0f / d[i]) & ~(Mask)(x[i] < kSiluLow)); });
}
/// e^-x for 0 <= x <= 80.
template <size_t N>
[[gnu::always_inline]] inline void vector_exp_minus(Vec<float> (&x)[N]) {
  Vec<float> d[N];
  detail::exp_minus<false>(d, x);
  detail::each_index<N>([&](size_t i) { x[i] = d[i]; });
}
#endif

// Where nothing above serves: each value by itself.
template <class V, size_t N>
[[gnu::always_inline]] inline void vector_exp_minus(V (&x)[N]) {
  each_value(x, [](auto v) { return vexp(-v); });
}
template <class V, size_t N>
[[gnu::always_inline]] inline void vector_sigmoid(V (&x)[N]) {
  each_value(x, [](auto v) { return vsigmoid(v); });
}
template <class V, size_t N>
[[gnu::always_inline]] inline void vector_silu(V (&x)[N]) {
  each_value(x, [](auto v) { return vsilu(v); });
}
template <class V, size_t N>
[[gnu::always_inline]] inline void vector_silu_slope(V (&x)[N]) {
  each_value(x, [](auto v) { return vsilu_and_slope(v).slope; });
}
template <class V, size_t N>
[[gnu::always_inline]] inline void vector_silu_and_slope(V (&x)[N], V (&slope)[N]) {
  for (size_t i = 0; i < N; ++i) slope[i] = x[i];
  vector_silu_slope(slope);
  each_value(x, [](auto v) { return vsilu_and_slope(v).value; });
}

}  // namespace krait::kernels::cpu

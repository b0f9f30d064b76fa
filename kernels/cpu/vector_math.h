#pragma once
// Elementary functions for CPU inner loops. The float forms have no branches and no calls, so that a loop over
// them under `#pragma omp simd` becomes vector code (the standard library's do not without -ffast-math).
// Always inlined: one call left in a loop keeps it scalar.
// Errors stay under 2.5 units in the last place; infinities, NaN, signed zeros,
// overflow and underflow give what std:: gives. The double forms call std::.
#include <bit>
#include <cmath>
#include <cstdint>

namespace krait::kernels::cpu {

/// a b + c, in one instruction where the target has one.
[[gnu::always_inline]] inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

namespace detail {

[[gnu::always_inline]] inline float from_bits(uint32_t u) { return std::bit_cast<float>(u); }
[[gnu::always_inline]] inline uint32_t to_bits(float x) { return std::bit_cast<uint32_t>(x); }

/// e^r - 1 for |r| <= ln 2 / 2. In pairs, since a loop over exponentials waits for the chain of its operations: a
/// processor's registers hold those of a few turns only.
[[gnu::always_inline]] inline float expm1_near(float r) {
  // (e^r - 1 - r) / r^2, minimax
  const float r2 = r * r;
  const float low = multiply_add(0x1.555556p-3f, r, 0.5f), middle = multiply_add(0x1.111090p-7f, r, 0x1.5554aep-5f);
  const float high = multiply_add(0x1.a1a13ap-13f, r, 0x1.6d7444p-10f);
  return multiply_add(multiply_add(multiply_add(high, r2, middle), r2, low), r2, r);
}

/// x = n ln 2 + r with |r| <= ln 2 / 2: expm1(r) and 2^n as two factors, whose product with it overflows or becomes
/// subnormal as it should. For |x| <= 110; beyond it, a value without meaning. NaN passes through expm1_r.
struct ExpParts {
  float expm1_r, scale, more_scale;
};
[[gnu::always_inline]] inline ExpParts exp_parts(float x) {
  // 1.5 2^23: adding it rounds to an integer in the low bits. They hold n + 254, so that one half and the other are
  // exponents with their bias; what else the halves hold leaves at the top.
  constexpr float kRound = 12582912.0f + 254.0f;
  const float t = multiply_add(x, 1.44269504f, kRound);
  const float nf = t - kRound;
  float r = multiply_add(nf, -0x1.62e4p-1f, x);  // ln 2 in two parts; the first has few bits
  r = multiply_add(nf, -0x1.7f7d1cp-20f, r);
  const uint32_t sum = to_bits(t), half = sum >> 1;
  return {expm1_near(r), from_bits(half << 23), from_bits((sum - half) << 23)};
}

}  // namespace detail

// The ends of the range are chosen from the result, not clamped in x: that takes fewer instructions, and none of them
// lie on the way from x to the result.
[[gnu::always_inline]] inline float vexp(float x) {
  const auto [e, s, t] = detail::exp_parts(x);
  float y = (e + 1.0f) * s * t;
  y = x > 90.0f ? __builtin_inff() : y;
  return x < -105.0f ? 0.0f : y;
}

namespace detail {

/// 1 + e^-x for -88 <= x <= 80; beyond them, a value without meaning. A sum with 1 needs no small values of the
/// exponential, so that its power of two is one factor, and 1 is added to it beside the polynomial.
[[gnu::always_inline]] inline float one_plus_exp_minus(float x) {
  constexpr float kRound = 12582912.0f + 127.0f;  // as in exp_parts; the low bits hold an exponent with its bias
  const float t = multiply_add(x, -1.44269504f, kRound);
  const float m = kRound - t;
  float r = multiply_add(m, -0x1.62e4p-1f, x);
  r = multiply_add(m, -0x1.7f7d1cp-20f, r);
  const float scale = from_bits(to_bits(t) << 23);
  return multiply_add(expm1_near(-r), scale, 1.0f + scale);
}

}  // namespace detail

[[gnu::always_inline]] inline float vexpm1(float x) {
  const auto [e, s, t] = detail::exp_parts(x);
  const float big = (e + 1.0f) * s * t, near = multiply_add(e, s * t, s * t - 1.0f);
  float y = x > 42.0f ? big : near;  // 2^61
  y = x > 90.0f ? __builtin_inff() : y;
  y = x < -20.0f ? -1.0f : y;
  return x == 0.0f ? x : y;
}

[[gnu::always_inline]] inline float vlog(float x) {
  const bool subnormal = x < 0x1p-126f;
  const float scaled = subnormal ? x * 0x1p25f : x;
  // x = 2^k m with m in [sqrt(1/2), sqrt(2))
  const uint32_t u = detail::to_bits(scaled) + (0x3F800000u - 0x3F3504F3u);
  const int32_t k = static_cast<int32_t>(u >> 23) - 127 - (subnormal ? 25 : 0);
  const float f = detail::from_bits((u & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  // log(1 + f) = f - f^2/2 + f^3 p(f), minimax
  float p = 0x1.1b77c4p-4f;
  p = multiply_add(p, f, -0x1.e287c4p-4f);
  p = multiply_add(p, f, 0x1.e6002ap-4f);
  p = multiply_add(p, f, -0x1.fb5058p-4f);
  p = multiply_add(p, f, 0x1.2339cep-3f);
  p = multiply_add(p, f, -0x1.5562b0p-3f);
  p = multiply_add(p, f, 0x1.99a4dap-3f);
  p = multiply_add(p, f, -0x1.ffffeep-3f);
  p = multiply_add(p, f, 0x1.555546p-2f);
  const float kf = static_cast<float>(k), f2 = f * f;
  float tail = multiply_add(p * f, f2, kf * -0x1.bd0106p-13f);  // ln 2 = 0x1.63p-1 - 0x1.bd0106p-13
  tail = multiply_add(f2, -0.5f, tail);
  float y = multiply_add(kf, 0x1.63p-1f, f + tail);
  constexpr float kInf = __builtin_inff();
  y = x == kInf ? kInf : y;
  y = x == 0.0f ? -kInf : y;
  return x >= 0.0f ? y : __builtin_nanf("");  // negative and NaN
}

[[gnu::always_inline]] inline float vlog1p(float x) {
  const float u = 1.0f + x;
  const float lost = x - (u - 1.0f);  // what rounding took from u
  const float y = vlog(u) + (x > 1e7f || u <= 0.0f ? 0.0f : lost / u);
  return u == 1.0f ? x : y;
}

[[gnu::always_inline]] inline float vtanh(float x) {
  const float a = std::fabs(x);
  const float t = vexpm1(a > 10.0f ? 20.0f : 2.0f * a);
  return std::copysign(t / (t + 2.0f), x);
}

[[gnu::always_inline]] inline float vsigmoid(float x) {
  float y = 1.0f / detail::one_plus_exp_minus(x);
  y = x > 80.0f ? 1.0f : y;
  return x < -88.0f ? 0.0f : y;
}

/// x sigmoid(x); 0 at -infinity.
[[gnu::always_inline]] inline float vsilu(float x) {
  float y = x / detail::one_plus_exp_minus(x);
  y = x > 80.0f ? x : y;
  return x < -88.0f ? -0.0f : y;
}

template <class A>
struct ValueAndSlope { A value, slope; };
/// silu(x) and its derivative by one division; 0 and 0 at -infinity.
[[gnu::always_inline]] inline ValueAndSlope<float> vsilu_and_slope(float x) {
  const float s = 1.0f / detail::one_plus_exp_minus(x);
  float value = x * s, slope = s * multiply_add(x, 1.0f - s, 1.0f);
  value = x > 80.0f ? x : value;
  slope = x > 80.0f ? 1.0f : slope;
  return {x < -88.0f ? -0.0f : value, x < -88.0f ? 0.0f : slope};
}

/// log(1 + e^x)
[[gnu::always_inline]] inline float vsoftplus(float x) {
  // Clamped here: vexp's 0 would be followed into vlog1p as a branch of its own, and the loop would stay scalar.
  const float a = -std::fabs(x), c = a < -105.0f ? -105.0f : a;
  const auto [e, s, t] = detail::exp_parts(c);
  return (x > 0.0f ? x : 0.0f) + vlog1p((e + 1.0f) * s * t);
}

[[gnu::always_inline]] inline float verf(float x) {
  const float a = std::fabs(x), s = x * x;
  // |x| < 0.93: erf(x) = x + x p(x^2)
  float p = 0x1.5e062ep-14f;
  p = multiply_add(p, s, -0x1.aaa2d8p-11f);
  p = multiply_add(p, s, 0x1.54d42ap-8f);
  p = multiply_add(p, s, -0x1.b80ff2p-6f);
  p = multiply_add(p, s, 0x1.ce2e1cp-4f);
  p = multiply_add(p, s, -0x1.812744p-2f);
  p = multiply_add(p, s, 0x1.06eba8p-3f);
  const float inner = multiply_add(x, p, x);
  // else 1 - exp(-g(|x|)); at 4 the result is 1
  const float t = a > 4.0f ? 4.0f : a;
  float g = 0x1.63094ep-16f;
  g = multiply_add(g, t, -0x1.c85be8p-12f);
  g = multiply_add(g, t, 0x1.1196d0p-8f);
  g = multiply_add(g, t, -0x1.9bb50ap-6f);
  g = multiply_add(g, t, 0x1.bb926ap-4f);
  g = multiply_add(g, t, 0x1.444472p-1f);
  g = multiply_add(g, t, 0x1.212846p+0f);
  g = multiply_add(g, t, -0x1.70d52ap-13f);
  const float outer = std::copysign(1.0f - vexp(-g), x);
  return a < 0.925f ? inner : outer;
}

inline double vexp(double x) { return std::exp(x); }
inline double vexpm1(double x) { return std::expm1(x); }
inline double vlog(double x) { return std::log(x); }
inline double vlog1p(double x) { return std::log1p(x); }
inline double vtanh(double x) { return std::tanh(x); }
inline double vsigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
inline double vsilu(double x) { return x < -800.0 ? -0.0 : x / (1.0 + std::exp(-x)); }
inline ValueAndSlope<double> vsilu_and_slope(double x) {
  const double c = x < -800.0 ? -800.0 : x, s = vsigmoid(c);
  return {c * s, s * (1.0 + (c > 800.0 ? 800.0 : c) * (1.0 - s))};
}
inline double vsoftplus(double x) { return (x > 0.0 ? x : 0.0) + std::log1p(std::exp(-std::fabs(x))); }
inline double verf(double x) { return std::erf(x); }

}  // namespace krait::kernels::cpu

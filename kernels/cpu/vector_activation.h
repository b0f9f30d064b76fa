#pragma once
// Activations with their slopes, and the walk over a row that calls them.
#include <algorithm>
#include <array>
#include <utility>

#include "kernels/cpu/vector_silu.h"

namespace krait::kernels::cpu {

// Of one value in either precision, and of several vectors of floats at once (vector_silu.h says why): x becomes the value. What
// is not used folds away.
struct Silu {
  template <size_t N>
  [[gnu::always_inline]] static void vectors(Vec<float> (&x)[N], Vec<float> (&slope)[N]) {
    vector_silu_and_slope(x, slope);
  }
  template <class A>
  [[gnu::always_inline]] static ValueAndSlope<A> at(A x) {
    return vsilu_and_slope(x);
  }
};

struct GeluTanh {
  // 1 + tanh(u) = 2 sigmoid(2 u): one exponential and one division.
  template <size_t N>
  [[gnu::always_inline]] static void vectors(Vec<float> (&x)[N], Vec<float> (&slope)[N]) {
    constexpr float k = 1.5957691216057308f, q = 0.044715f;
    Vec<float> s[N];
    detail::each_index<N>([&](size_t i) { slope[i] = x[i] * x[i]; });
    detail::each_index<N>([&](size_t i) { s[i] = x[i] * (k + k * q * slope[i]); });
    detail::each_index<N>([&](size_t i) { slope[i] = k + 3 * k * q * slope[i]; });
    vector_sigmoid(s);
    detail::each_index<N>([&](size_t i) { x[i] *= s[i]; });
    detail::each_index<N>([&](size_t i) { slope[i] = s[i] + x[i] * (1.0f - s[i]) * slope[i]; });
  }
  template <class A>
  [[gnu::always_inline]] static ValueAndSlope<A> at(A x) {
    const A k = A(1.5957691216057308), q = A(0.044715);
    const A square = x * x, s = vsigmoid(x * (k + k * q * square)), slope = k + A(3) * k * q * square;
    return {x * s, s + x * s * (A(1) - s) * slope};
  }
};

struct GeluErf {
  // Phi(-a) = e^(-a^2 / 2) t p(t) with t = 1 / (1 + 0.21 a), minimax to 1.1e-8 of it for 0 <= a <= 12.6: the exponential is also
  // that of the slope, and nothing cancels where Phi is small. Beyond, values are those of -12.6 (1e-35) and Phi is 1.
  template <size_t N>
  [[gnu::always_inline]] static void vectors(Vec<float> (&x)[N], Vec<float> (&slope)[N]) {
    typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
    constexpr float p[] = {0x1.56d9a2p-4f,  0x1.5cf2a2p-4f, 0x1.1810cap-4f,  0x1.05e2d8p-3f, -0x1.9c2f46p-4f,
                           0x1.6f5944p-2f, -0x1.5a4b1ap-2f, 0x1.263c4cp-2f, -0x1.289d52p-4f};
    Vec<float> c[N], e[N], t[N], phi[N];
    detail::each_index<N>([&](size_t i) { x[i] = detail::at_least(x[i], -12.6f); });
    detail::each_index<N>([&](size_t i) { c[i] = detail::at_most(x[i], 12.6f); });
    detail::each_index<N>([&](size_t i) { t[i] = 1.0f / (1.0f + 0.21f * (Vec<float>)((Mask)c[i] & 0x7fffffff)); });
    detail::each_index<N>([&](size_t i) { e[i] = 0.5f * c[i] * c[i]; });
    vector_exp_minus(e);
    detail::each_index<N>([&](size_t i) { phi[i] = p[8] * t[i] + p[7]; });
    detail::each_index<7>([&](size_t j) { detail::each_index<N>([&](size_t i) { phi[i] = phi[i] * t[i] + p[6 - j]; }); });
    detail::each_index<N>([&](size_t i) { phi[i] *= e[i] * t[i]; });
    detail::each_index<N>([&](size_t i) { phi[i] = c[i] < 0.0f ? phi[i] : 1.0f - phi[i]; });
    detail::each_index<N>([&](size_t i) { slope[i] = phi[i] + 0.3989422804f * c[i] * e[i]; });
    detail::each_index<N>([&](size_t i) { x[i] *= phi[i]; });
  }
  template <class A>
  [[gnu::always_inline]] static ValueAndSlope<A> at(A x) {
    const A phi = A(0.5) * (A(1) + verf(x * A(0.70710678118654752440)));
    return {x * phi, phi + x * A(0.39894228040143267794) * vexp(A(-0.5) * x * x)};
  }
};

struct Relu {
  template <size_t N>
  [[gnu::always_inline]] static void vectors(Vec<float> (&x)[N], Vec<float> (&slope)[N]) {
    detail::each_index<N>([&](size_t i) { slope[i] = x[i] > 0.0f ? Vec<float>{} + 1.0f : Vec<float>{}; });
    detail::each_index<N>([&](size_t i) { x[i] = x[i] > 0.0f ? x[i] : Vec<float>{}; });
  }
  template <class A>
  [[gnu::always_inline]] static ValueAndSlope<A> at(A x) {
    return x > A(0) ? ValueAndSlope<A>{x, A(1)} : ValueAndSlope<A>{A(0), A(0)};
  }
};

struct Relu2 {
  template <size_t N>
  [[gnu::always_inline]] static void vectors(Vec<float> (&x)[N], Vec<float> (&slope)[N]) {
    detail::each_index<N>([&](size_t i) { x[i] = x[i] < 0.0f ? Vec<float>{} : x[i]; });  // keeps NaN
    detail::each_index<N>([&](size_t i) { slope[i] = 2.0f * x[i]; });
    detail::each_index<N>([&](size_t i) { x[i] *= x[i]; });
  }
  template <class A>
  [[gnu::always_inline]] static ValueAndSlope<A> at(A x) {
    const A p = x < A(0) ? A(0) : x;
    return {p * p, A(2) * p};
  }
};

struct Sigmoid {
  template <size_t N>
  [[gnu::always_inline]] static void vectors(Vec<float> (&x)[N], Vec<float> (&slope)[N]) {
    vector_sigmoid(x);
    detail::each_index<N>([&](size_t i) { slope[i] = x[i] * (1.0f - x[i]); });
  }
  template <class A>
  [[gnu::always_inline]] static ValueAndSlope<A> at(A x) {
    const A s = vsigmoid(x);
    return {s, s * (A(1) - s)};
  }
};

namespace detail {

// Four vectors at once and then one by one; what is left goes through copies, so that a value's bits do not depend on its
// place.
template <class Fn, class T, size_t Out, size_t In, class F>
[[gnu::always_inline]] inline void map_vectors(const std::array<T*, Out>& out, const T* x, const std::array<const T*, In>& others,
                                               int64_t n, F f) {
  using A = accum_t<T>;
  constexpr int64_t kOne = kLanes<A>, kFour = 4 * kOne;
  const auto group = [&]<size_t N>(const std::array<T*, Out>& to, const T* from, const std::array<const T*, In>& more, int64_t j)
      __attribute__((always_inline)) {
    Vec<A> value[N], slope[N];
    each_index<N>([&](size_t i) { value[i] = widened<A>(from + j + static_cast<int64_t>(i) * kOne); });
    Fn::vectors(value, slope);
    each_index<N>([&](size_t i) {
      const int64_t at = j + static_cast<int64_t>(i) * kOne;
      [&]<size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) {
        const std::array<Vec<A>, Out> result = f(value[i], slope[i], widened<A>(more[I] + at)...);
        for (size_t o = 0; o < Out; ++o) put_vector<A>(to[o] + at, result[o]);
      }(std::make_index_sequence<In>());
    });
  };
  int64_t j = 0;
  for (; j + kFour <= n; j += kFour) group.template operator()<4>(out, x, others, j);
  for (; j + kOne <= n; j += kOne) group.template operator()<1>(out, x, others, j);
  if (j == n) return;
  T from[1 + In][kOne] = {}, to[Out][kOne];
  std::array<T*, Out> results;
  std::array<const T*, In> more;
  std::copy(x + j, x + n, from[In]);
  for (size_t i = 0; i < In; ++i) more[i] = std::copy(others[i] + j, others[i] + n, from[i]) - (n - j);
  for (size_t o = 0; o < Out; ++o) results[o] = to[o];
  group.template operator()<1>(results, from[In], more, 0);
  for (size_t o = 0; o < Out; ++o) std::copy(to[o], to[o] + (n - j), out[o] + j);
}

}  // namespace detail

/// out = f(value, slope, others...) of n values of x, which may be one of out; f takes values and vectors of them.
template <class Fn, class T, size_t Out, size_t In, class F>
[[gnu::always_inline]] inline void map_activation(const std::array<T*, Out>& out, const T* x, const std::array<const T*, In>& others,
                                                  int64_t n, F f) {
  using A = accum_t<T>;
  if constexpr (std::is_same_v<A, float>) {
    detail::map_vectors<Fn>(out, x, others, n, f);
  } else {
    for (int64_t j = 0; j < n; ++j) {
      const ValueAndSlope<A> at = Fn::at(static_cast<A>(x[j]));
      [&]<size_t... I>(std::index_sequence<I...>) {
        const std::array<A, Out> result = f(at.value, at.slope, static_cast<A>(others[I][j])...);
        for (size_t o = 0; o < Out; ++o) put(out[o][j], result[o]);
      }(std::make_index_sequence<In>());
    }
  }
}

}  // namespace krait::kernels::cpu

#include "kernels/activation.h"

#include <algorithm>
#include <array>
#include <utility>

#include "core/parallel.h"
#include "kernels/cpu/put.h"
#include "kernels/cpu/vector_silu.h"

namespace krait::kernels::cpu {

namespace {

constexpr int64_t kGrain = 8192;

// Branch-free per element, so that the loops over them vectorise. The unused half folds away. What waits for an exponential and a
// division goes by several vectors at once (vector_silu.h): x becomes the value.
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
  template <class A>
  [[gnu::always_inline]] static ValueAndSlope<A> at(A x) {
    const A phi = A(0.5) * (A(1) + verf(x * A(0.70710678118654752440)));
    return {x * phi, phi + x * A(0.39894228040143267794) * vexp(A(-0.5) * x * x)};
  }
};
struct Relu2 {
  template <class A>
  [[gnu::always_inline]] static ValueAndSlope<A> at(A x) {
    const A p = x < A(0) ? A(0) : x;  // keeps NaN
    return {p * p, A(2) * p};
  }
};

struct Sigmoid {
  template <class A>
  [[gnu::always_inline]] static ValueAndSlope<A> at(A x) {
    const A s = vsigmoid(x);
    return {s, s * (A(1) - s)};
  }
};

template <class F>
void visit_activation(Activation f, F&& body) {
  switch (f) {
    case Activation::silu: return body.template operator()<Silu>();
    case Activation::gelu_tanh: return body.template operator()<GeluTanh>();
    case Activation::gelu_erf: return body.template operator()<GeluErf>();
    case Activation::relu2: return body.template operator()<Relu2>();
    case Activation::sigmoid: return body.template operator()<Sigmoid>();
  }
}

// Calls body.operator()<T, Function>() for the dtype and the activation.
template <class F>
void visit_both(DType dtype, Activation f, F&& body) {
  visit_float(dtype, [&]<class T>() { visit_activation(f, [&]<class Fn>() { body.template operator()<T, Fn>(); }); });
}

template <class Fn, class A>
concept ByVectors = std::is_same_v<A, float> && requires(Vec<float> (&v)[1]) { Fn::vectors(v, v); };

// out = f(value, slope, others...) of n values of x, four vectors at once and then one by one; what is left goes through
// copies, so that a value's bits do not depend on its place.
template <class Fn, class T, size_t Out, size_t In, class F>
[[gnu::always_inline]] inline void map_vectors(const std::array<T*, Out>& out, const T* x, const std::array<const T*, In>& others,
                                               int64_t n, F f) {
  using A = accum_t<T>;
  constexpr int64_t kOne = kLanes<A>, kFour = 4 * kOne;
  const auto group = [&]<size_t N>(const std::array<T*, Out>& to, const T* from, const std::array<const T*, In>& more, int64_t j)
      __attribute__((always_inline)) {
    Vec<A> value[N], slope[N];
    detail::each_index<N>([&](size_t i) { value[i] = widened<A>(from + j + static_cast<int64_t>(i) * kOne); });
    Fn::vectors(value, slope);
    detail::each_index<N>([&](size_t i) {
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

}  // namespace

void activation_forward(Tensor& y_out, const Tensor& x_in, Activation f) {
  visit_both(x_in.dtype(), f, [&]<class T, class Fn>() {
    T* __restrict y = y_out.data<T>();
    const T* __restrict x = x_in.data<T>();
    parallel_for(0, x_in.numel(), kGrain, [=](int64_t first, int64_t last) {
      if constexpr (ByVectors<Fn, accum_t<T>>)
        return map_vectors<Fn, T, 1, 0>({y + first}, x + first, {}, last - first,
                                        [](auto value, auto) { return std::array{value}; });
#pragma omp simd
      for (int64_t i = first; i < last; ++i) put(y[i], Fn::at(static_cast<accum_t<T>>(x[i])).value);
    });
  });
}

void activation_backward(Tensor& dx_out, const Tensor& dy_in, const Tensor& x_in, Activation f) {
  visit_both(x_in.dtype(), f, [&]<class T, class Fn>() {
    using A = accum_t<T>;
    T* __restrict dx = dx_out.data<T>();
    const T* __restrict dy = dy_in.data<T>();
    const T* __restrict x = x_in.data<T>();
    parallel_for(0, x_in.numel(), kGrain, [=](int64_t first, int64_t last) {
      if constexpr (ByVectors<Fn, A>)
        return map_vectors<Fn, T, 1, 1>({dx + first}, x + first, {dy + first}, last - first,
                                        [](auto, auto slope, auto up) { return std::array{up * slope}; });
#pragma omp simd
      for (int64_t i = first; i < last; ++i)
        put(dx[i], static_cast<A>(dy[i]) * Fn::at(static_cast<A>(x[i])).slope);
    });
  });
}

void glu_forward(Tensor& y_out, const Tensor& gate_in, const Tensor& up_in, Activation f) {
  const int64_t r = y_out.size(0), n = y_out.size(1), stride = gate_in.stride(0);
  visit_both(y_out.dtype(), f, [&]<class T, class Fn>() {
    using A = accum_t<T>;
    T* y_all = y_out.data<T>();
    const T *gate_all = gate_in.data<T>(), *up_all = up_in.data<T>();
    parallel_for(0, r, std::max<int64_t>(1, kGrain / n), [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        T* __restrict y = y_all + i * n;
        const T* __restrict gate = gate_all + i * stride;
        const T* __restrict up = up_all + i * stride;
        if constexpr (ByVectors<Fn, A>) {
          map_vectors<Fn, T, 1, 1>({y}, gate, {up}, n, [](auto value, auto, auto by) { return std::array{value * by}; });
          continue;
        }
#pragma omp simd
        for (int64_t j = 0; j < n; ++j)
          put(y[j], Fn::at(static_cast<A>(gate[j])).value * static_cast<A>(up[j]));
      }
    });
  });
}

void glu_backward(Tensor& dgate_out, Tensor& dup_out, const Tensor& dy_in, const Tensor& gate_in, const Tensor& up_in,
                  Activation f) {
  const int64_t r = dy_in.size(0), n = dy_in.size(1), stride = gate_in.stride(0), out_stride = dgate_out.stride(0);
  visit_both(dy_in.dtype(), f, [&]<class T, class Fn>() {
    using A = accum_t<T>;
    T *dgate_all = dgate_out.data<T>(), *dup_all = dup_out.data<T>();
    const T *dy_all = dy_in.data<T>(), *gate_all = gate_in.data<T>(), *up_all = up_in.data<T>();
    parallel_for(0, r, std::max<int64_t>(1, kGrain / n), [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        T* __restrict dgate = dgate_all + i * out_stride;
        T* __restrict dup = dup_all + i * out_stride;
        const T* __restrict dy = dy_all + i * n;
        const T* __restrict gate = gate_all + i * stride;
        const T* __restrict up = up_all + i * stride;
        if constexpr (ByVectors<Fn, A>) {
          map_vectors<Fn, T, 2, 2>({dgate, dup}, gate, {dy, up}, n,
                                   [](auto value, auto slope, auto d, auto by) { return std::array{d * by * slope, d * value}; });
          continue;
        }
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const A d = static_cast<A>(dy[j]);
          const ValueAndSlope<A> at = Fn::at(static_cast<A>(gate[j]));
          put(dgate[j], d * static_cast<A>(up[j]) * at.slope);
          put(dup[j], d * at.value);
        }
      }
    });
  });
}

}  // namespace krait::kernels::cpu

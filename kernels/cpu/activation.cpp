#include "kernels/activation.h"

#include "core/parallel.h"
#include "kernels/cpu/put.h"
#include "kernels/cpu/vector_math.h"

namespace krait::kernels::cpu {

namespace {

constexpr int64_t kGrain = 8192;

// Branch-free per element, so that the loops over them vectorise. The unused half folds away.
struct Silu {
  template <class A>
  [[gnu::always_inline]] static ValueAndSlope<A> at(A x) {
    return vsilu_and_slope(x);
  }
};
struct GeluTanh {
  // 1 + tanh(u) = 2 sigmoid(2 u): one exponential and one division.
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

}  // namespace

void activation_forward(Tensor& y_out, const Tensor& x_in, Activation f) {
  visit_both(x_in.dtype(), f, [&]<class T, class Fn>() {
    T* __restrict y = y_out.data<T>();
    const T* __restrict x = x_in.data<T>();
    parallel_for(0, x_in.numel(), kGrain, [=](int64_t first, int64_t last) {
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

#include "kernels/activation.h"

#include <algorithm>

#include "core/parallel.h"
#include "kernels/cpu/vector_activation.h"

namespace krait::kernels::cpu {

namespace {

constexpr int64_t kGrain = 8192;

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
    T* y = y_out.data<T>();
    const T* x = x_in.data<T>();
    parallel_for(0, x_in.numel(), kGrain, [=](int64_t first, int64_t last) {
      map_activation<Fn, T, 1, 0>({y + first}, x + first, {}, last - first, [](auto value, auto) { return std::array{value}; });
    });
  });
}

void activation_backward(Tensor& dx_out, const Tensor& dy_in, const Tensor& x_in, Activation f) {
  visit_both(x_in.dtype(), f, [&]<class T, class Fn>() {
    T* dx = dx_out.data<T>();
    const T *dy = dy_in.data<T>(), *x = x_in.data<T>();
    parallel_for(0, x_in.numel(), kGrain, [=](int64_t first, int64_t last) {
      map_activation<Fn, T, 1, 1>({dx + first}, x + first, {dy + first}, last - first,
                                  [](auto, auto slope, auto up) { return std::array{up * slope}; });
    });
  });
}

void glu_forward(Tensor& y_out, const Tensor& gate_in, const Tensor& up_in, Activation f) {
  const int64_t r = y_out.size(0), n = y_out.size(1), stride = gate_in.stride(0);
  visit_both(y_out.dtype(), f, [&]<class T, class Fn>() {
    T* y = y_out.data<T>();
    const T *gate = gate_in.data<T>(), *up = up_in.data<T>();
    parallel_for(0, r, std::max<int64_t>(1, kGrain / n), [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        map_activation<Fn, T, 1, 1>({y + i * n}, gate + i * stride, {up + i * stride}, n,
                                    [](auto value, auto, auto by) { return std::array{value * by}; });
    });
  });
}

void glu_backward(Tensor& dgate_out, Tensor& dup_out, const Tensor& dy_in, const Tensor& gate_in, const Tensor& up_in,
                  Activation f) {
  const int64_t r = dy_in.size(0), n = dy_in.size(1), stride = gate_in.stride(0), out_stride = dgate_out.stride(0);
  visit_both(dy_in.dtype(), f, [&]<class T, class Fn>() {
    T *dgate = dgate_out.data<T>(), *dup = dup_out.data<T>();
    const T *dy = dy_in.data<T>(), *gate = gate_in.data<T>(), *up = up_in.data<T>();
    parallel_for(0, r, std::max<int64_t>(1, kGrain / n), [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        map_activation<Fn, T, 2, 2>({dgate + i * out_stride, dup + i * out_stride}, gate + i * stride, {dy + i * n, up + i * stride},
                                    n, [](auto value, auto slope, auto d, auto by) { return std::array{d * by * slope, d * value}; });
    });
  });
}

}  // namespace krait::kernels::cpu

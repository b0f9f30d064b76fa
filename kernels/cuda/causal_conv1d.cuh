#pragma once
#include "core/cuda/launch.cuh"
#include "kernels/causal_conv1d.h"
#include "kernels/cuda/exp2.cuh"

// What the causal convolution's kernels share.
namespace krait::kernels::cuda {

template <class A>
__device__ __forceinline__ A sigmoid_of(A p) {
  return A(1) / (A(1) + exp(-p));
}
__device__ __forceinline__ float sigmoid_of(float p) { return reciprocal_fast(1.0f + exp2_fast(p * -kLog2e)); }

// silu(p) without infinity times 0.
template <class A>
__device__ __forceinline__ A silu_of(A p) {
  const A x = p < A(-110) ? A(-110) : p;
  return x * sigmoid_of(x);
}
template <class A>
__device__ __forceinline__ A silu_slope(A p) {
  const A x = p < A(-110) ? A(-110) : p;
  const A s = sigmoid_of(x);
  return s * (A(1) + x * (A(1) - s));
}

// Pointers of one batch row and channel; strides in elements.
template <class T>
struct ConvLine {
  const T *x, *initial;     // initial may be null
  const int32_t* segments;  // may be null
  int64_t l, c, stride;
  int k;

  __device__ bool together(int64_t s, int64_t t) const {
    return segments == nullptr || segments[s < 0 ? 0 : s] == segments[t];
  }
  // Input s as position t sees it.
  template <class A>
  __device__ A input(int64_t s, int64_t t) const {
    if (!together(s, t)) return A(0);
    if (s >= 0) return static_cast<A>(x[s * stride]);
    return initial == nullptr ? A(0) : static_cast<A>(initial[(s + k - 1) * c]);
  }
};

template <class T>
struct ConvInputs {
  const T *x, *initial;
  const accum_t<T>*weight, *bias;
  const int32_t* segments;
  int64_t l, c, x_batch, x_row;
  int k;
  bool silu;

  __device__ ConvLine<T> line(int64_t row, int64_t channel) const {
    return {x + row * x_batch + channel, initial == nullptr ? nullptr : initial + row * (k - 1) * c + channel,
            segments == nullptr ? nullptr : segments + row * l, l, c, x_row, k};
  }
};

template <class T>
struct ConvGradients {
  T *dx, *dinitial;  // dinitial may be null
  const T *dy, *dfinal;  // dfinal may be null
  int64_t dy_batch, dy_row, dx_batch, dx_row;

  // Adds what the final state sends back to input s, and stores.
  template <class A>
  __device__ void store(const ConvLine<T>& line, int64_t row, int64_t channel, int64_t s, A d) const {
    const int64_t kept = s - (line.l - line.k + 1);
    if (dfinal != nullptr && kept >= 0 && line.together(s, line.l - 1))
      d += static_cast<A>(dfinal[(row * (line.k - 1) + kept) * line.c + channel]);
    if (s >= 0)
      dx[row * dx_batch + s * dx_row + channel] = static_cast<T>(d);
    else if (dinitial != nullptr)
      dinitial[(row * (line.k - 1) + s + line.k - 1) * line.c + channel] = static_cast<T>(d);
  }
};

template <class T>
T* conv_pointer(const Tensor& t) {
  return t.defined() && t.numel() > 0 ? t.data<T>() : nullptr;
}

template <class T>
ConvInputs<T> conv_inputs(const CausalConv1dInputs& in) {
  using A = accum_t<T>;
  return {in.x.data<T>(), conv_pointer<T>(in.initial), in.weight.data<A>(), conv_pointer<A>(in.bias),
          conv_pointer<int32_t>(in.segments), in.x.size(1), in.x.size(2), in.x.stride(0), in.x.stride(1),
          static_cast<int>(in.weight.size(1)), in.silu};
}

template <class T>
ConvGradients<T> conv_gradients(const Tensor& dx, const Tensor& dinitial, const Tensor& dy, const Tensor& dfinal) {
  return {dx.data<T>(),  conv_pointer<T>(dinitial), dy.data<T>(),  conv_pointer<T>(dfinal),
          dy.stride(0), dy.stride(1),              dx.stride(0), dx.stride(1)};
}

// Sums partial (pieces, k + 1, c) over its first dimension, in a fixed order.
void sum_conv_taps(Tensor& dweight, bool add_dweight, Tensor& dbias, bool add_dbias, const Tensor& partial);

// Width 4 with channels in whole vectors of 16 bytes: fp32 and bf16. False where it does not serve.
bool conv_four_forward(Tensor& y, Tensor& final_state, const CausalConv1dInputs& in);
bool conv_four_backward(Tensor& dx, Tensor& dinitial, Tensor& dweight, bool add_dweight, Tensor& dbias, bool add_dbias,
                        const Tensor& dy, const Tensor& dfinal, const CausalConv1dInputs& in);

}  // namespace krait::kernels::cuda

#pragma once
// The one kernel behind every elementwise operation; see kernels/elementwise.h.
#include <array>

#include "core/cuda/launch.cuh"
#include "kernels/elementwise.h"

namespace krait::kernels::cuda {

namespace math {
template <class A> __device__ A exp(A x) { return ::exp(x); }
template <class A> __device__ A expm1(A x) { return ::expm1(x); }
template <class A> __device__ A log(A x) { return ::log(x); }
template <class A> __device__ A log1p(A x) { return ::log1p(x); }
template <class A> __device__ A tanh(A x) { return ::tanh(x); }
template <class A> __device__ A sigmoid(A x) { return A(1) / (A(1) + ::exp(-x)); }
template <class A> __device__ A softplus(A x) { return (x > A(0) ? x : A(0)) + ::log1p(::exp(-::fabs(x))); }
template <class A> __device__ A erf(A x) { return ::erf(x); }
template <class A> __device__ A sqrt(A x) { return ::sqrt(x); }
template <class A> __device__ A abs(A x) { return ::fabs(x); }
template <class A> __device__ A sin(A x) { return ::sin(x); }
template <class A> __device__ A cos(A x) { return ::cos(x); }
template <class A> __device__ A pow(A x, A y) { return ::pow(x, y); }
}  // namespace math

constexpr int kMaxDims = 8;

// What a value is computed in; integers are only compared.
template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, int64_t>, double, accum_t<T>>;

// Dimensions innermost first, joined where all inputs allow it.
template <int N>
struct Layout {
  int dims = 0;
  int64_t size[kMaxDims] = {}, stride[N][kMaxDims] = {};
};

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

template <class A, class T>
__device__ A widen(T v) {
  if constexpr (std::is_same_v<T, bf16>)
    return static_cast<A>(static_cast<float>(v));
  else
    return static_cast<A>(v);
}

template <class T, class A>
__device__ T narrow(A v) {
  if constexpr (std::is_same_v<T, bf16>)
    return bf16(static_cast<float>(v));
  else
    return static_cast<T>(v);
}

// V neighbours of one input, from element `at`; `step` is the innermost stride, 0 or 1 when V > 1.
template <class T, int V, class A>
__device__ void fetch(A* to, const void* from, int64_t at, int64_t step) {
  const T* const p = static_cast<const T*>(from) + at;
  if (V > 1 && step == 1) {
    const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(p);
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = widen<A>(pack.value[v]);
  } else {
    const A value = widen<A>(*p);
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = value;
  }
}

// A thread makes V neighbouring values at a time. `Mask` is the type of the first input where it differs from T.
// Bound by memory.
template <class F, class Y, class Mask, class T, int V>
__global__ void elementwise_kernel(Y* y, const void* a, const void* b, const void* c, int64_t n,
                                   Layout<F::inputs> layout, compute_t<T> p, compute_t<T> q) {
  using A = compute_t<T>;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i * V < n; i += stride) {
    int64_t at[F::inputs] = {};
    uint64_t rest = static_cast<uint64_t>(i * V);
    for (int d = 0; d < layout.dims; ++d) {
      uint64_t index = rest;
      if (d + 1 < layout.dims) {  // the outermost dimension takes what is left
        const auto size = static_cast<uint64_t>(layout.size[d]);
        // 32-bit division is several times faster and nearly always enough.
        const uint64_t quotient = (rest | size) >> 32 ? rest / size : static_cast<uint32_t>(rest) / static_cast<uint32_t>(size);
        index = rest - quotient * size;
        rest = quotient;
      }
#pragma unroll
      for (int k = 0; k < F::inputs; ++k) at[k] += static_cast<int64_t>(index) * layout.stride[k][d];
    }
    A x[3][V] = {};
    fetch<Mask, V>(x[0], a, at[0], layout.stride[0][0]);
    if constexpr (F::inputs > 1) fetch<T, V>(x[1], b, at[1], layout.stride[1][0]);
    if constexpr (F::inputs > 2) fetch<T, V>(x[2], c, at[2], layout.stride[2][0]);
    Pack<Y, V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) out.value[v] = narrow<Y>(F::value(x[0][v], x[1][v], x[2][v], p, q));
    *reinterpret_cast<Pack<Y, V>*>(y + i * V) = out;
  }
}

template <int N>
Layout<N> layout_of(const Tensor& y, Inputs in) {
  Layout<N> l;
  for (int64_t d = y.ndim() - 1; d >= 0; --d) {
    if (y.size(d) == 1) continue;
    bool joins = l.dims > 0;
    for (int k = 0; joins && k < N; ++k)
      joins = in[static_cast<size_t>(k)].stride(d) == l.stride[k][l.dims - 1] * l.size[l.dims - 1];
    if (joins) {
      l.size[l.dims - 1] *= y.size(d);
      continue;
    }
    KRAIT_CHECK(l.dims < kMaxDims, "elementwise operation over {} with more than {} strides; use contiguous()",
                y.shape(), kMaxDims);
    l.size[l.dims] = y.size(d);
    for (int k = 0; k < N; ++k) l.stride[k][l.dims] = in[static_cast<size_t>(k)].stride(d);
    ++l.dims;
  }
  if (l.dims == 0) {
    l.dims = 1;
    l.size[0] = 1;
    for (int k = 0; k < N; ++k) l.stride[k][0] = 1;
  }
  return l;
}

// Whether packs of V values are whole and aligned in every input.
template <int N>
bool packs(const Layout<N>& l, Inputs in, int64_t n, int v) {
  if (n % v != 0 || l.size[0] % v != 0) return false;
  for (int k = 0; k < N; ++k) {
    const Tensor& t = in[static_cast<size_t>(k)];
    if (l.stride[k][0] == 0) continue;
    if (l.stride[k][0] != 1 || t.offset() % v != 0) return false;
    for (int d = 1; d < l.dims; ++d)
      if (l.stride[k][d] % v != 0) return false;
    if (reinterpret_cast<uintptr_t>(t.storage()->data()) % 64 != 0) return false;
  }
  return true;
}

template <class F, class Y, class Mask, class T>
void run_typed(Tensor& y, Inputs in, double p, double q) {
  constexpr int kVector = 16 / sizeof(T);
  const int64_t n = y.numel();
  const Layout<F::inputs> layout = layout_of<F::inputs>(y, in);
  const auto go = [&]<int V>() {
    const auto pointer = [&](size_t k) { return k < in.size() ? in[k].raw_data() : nullptr; };
    launch(elementwise_kernel<F, Y, Mask, T, V>,
           {.grid = std::min<int64_t>(ceil_div(n / V, 256), 132 * 16), .stream = current_stream(y.device())},
           y.data<Y>(), pointer(0), pointer(1), pointer(2), n, layout, p, q);
  };
  if (packs(layout, in, n, kVector))
    go.template operator()<kVector>();
  else
    go.template operator()<1>();
}

enum class Kind { value, comparison, where };

template <class F, Kind kind>
void run(Tensor& y, Inputs in, double p, double q) {
  if constexpr (kind == Kind::comparison) {
    const DType dtype = in[0].dtype();
    if (dtype == DType::i64) return run_typed<F, bool, int64_t, int64_t>(y, in, p, q);
    visit_float(dtype, [&]<class T>() { run_typed<F, bool, T, T>(y, in, p, q); });
  } else {
    visit_float(y.dtype(), [&]<class T>() {
      run_typed<F, T, std::conditional_t<kind == Kind::where, bool, T>, T>(y, in, p, q);
    });
  }
}

}  // namespace krait::kernels::cuda

#define KRAIT_DEFINE(name, n, kind, expression)                                                             \
  namespace {                                                                                               \
  struct name##_op {                                                                                        \
    static constexpr int inputs = n;                                                                        \
    template <class A>                                                                                      \
    __device__ static A value([[maybe_unused]] A a, [[maybe_unused]] A b, [[maybe_unused]] A c,             \
                              [[maybe_unused]] A p, [[maybe_unused]] A q) {                                 \
      return static_cast<A>(expression);                                                                    \
    }                                                                                                       \
  };                                                                                                        \
  }                                                                                                         \
  void name(Tensor& y, Inputs in, double p, double q) { run<name##_op, kind>(y, in, p, q); }

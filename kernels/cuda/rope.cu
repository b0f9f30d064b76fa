#include "core/cuda/launch.cuh"
#include "kernels/cuda/linear_fused.h"
#include "kernels/cuda/packed.cuh"
#include "kernels/rope.h"

namespace krait::kernels::cuda {

namespace {

struct Strides { int64_t b, l, h; };

// One block per (b, l), one thread per unit of a head: V pairs, which are two vectors of V channels (half: at u V and
// half + u V; interleaved: at 2 u V and 2 u V + V), or V channels that pass through. Vectors are read before they
// are written, so y may be x. Bound by memory: 2 b l h d sizeof(T) bytes.
template <class T, int V, class I>
__global__ void rope_kernel(T* y, const T* x, const accum_t<T>* __restrict__ cos, const accum_t<T>* __restrict__ sin,
                            const I* __restrict__ positions, int64_t positions_b, int64_t positions_l, int64_t offset,
                            int64_t max_len, Strides ys, Strides xs, int64_t l, int h, int d, int half,
                            bool interleaved, bool inverse) {
  using A = accum_t<T>;
  const int64_t ib = blockIdx.x / l, il = blockIdx.x - ib * l;
  const int64_t at = positions != nullptr ? static_cast<int64_t>(positions[ib * positions_b + il * positions_l]) : il;
  const int64_t p = offset + at;
  const bool inside = p >= 0 && p < max_len;
  x += ib * xs.b + il * xs.l;
  y += ib * ys.b + il * ys.l;
  const int rotated = half / V, units = rotated + (x == y ? 0 : (d - 2 * half) / V);
  for (int i = static_cast<int>(threadIdx.x); i < h * units; i += static_cast<int>(blockDim.x)) {
    const int ih = i / units, u = i - ih * units;
    const T* from = x + ih * xs.h;
    T* to = y + ih * ys.h;
    if (u >= rotated) {
      const int col = 2 * half + (u - rotated) * V;
      Packed<T, V> v;
      v.load(from + col);
      v.store(to + col);
      continue;
    }
    const int first = interleaved ? 2 * u * V : u * V, second = interleaved ? first + V : half + first;
    A a[V], b[V], v[2 * V], c[V], s[V];  // v: the 2 V channels in order
    load_values(a, from + first);
    load_values(b, from + second);
    if (inside) {
      load_values(c, cos + p * half + u * V);
      load_values(s, sin + p * half + u * V);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) c[k] = s[k] = static_cast<A>(nanf(""));
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      v[k] = a[k];
      v[V + k] = b[k];
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A sine = inverse ? -s[k] : s[k];
      const A p0 = interleaved ? v[2 * k] : v[k], p1 = interleaved ? v[2 * k + 1] : v[V + k];
      a[k] = p0 * c[k] - p1 * sine;
      b[k] = p0 * sine + p1 * c[k];
    }
    if (interleaved) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        v[2 * k] = a[k];
        v[2 * k + 1] = b[k];
      }
#pragma unroll
      for (int k = 0; k < V; ++k) {
        a[k] = v[k];
        b[k] = v[V + k];
      }
    }
    store_values(to + first, a);
    store_values(to + second, b);
  }
}

}  // namespace

void rope(Tensor& y, const Tensor& x, const Tensor& cos, const Tensor& sin, RopeStyle style, const Tensor& positions,
          int64_t offset, bool inverse) {
  const int64_t b = x.size(0), l = x.size(1), h = x.size(2), d = x.size(3), half = cos.size(1);
  const Strides ys{y.stride(0), y.stride(1), y.stride(2)}, xs{x.stride(0), x.stride(1), x.stride(2)};
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    constexpr int V = 16 / sizeof(T);
    bool wide = half % V == 0 && d % V == 0 && aligned16(y.data<T>(), x.data<T>(), cos.data<A>(), sin.data<A>());
    for (const int64_t stride : {ys.b, ys.l, ys.h, xs.b, xs.l, xs.h}) wide = wide && stride % V == 0;
    const auto run = [&]<int kV, class I>() {
      const int64_t threads = h * ceil_div(d, 2 * kV);
      launch(rope_kernel<T, kV, I>,
             {.grid = b * l, .block = static_cast<int>(std::clamp<int64_t>(ceil_div(threads, 32) * 32, 32, 256)),
              .stream = current_stream(x.device())},
             y.data<T>(), x.data<T>(), cos.data<A>(), sin.data<A>(),
             positions.defined() ? positions.data<I>() : nullptr, positions.defined() ? positions.stride(0) : 0,
             positions.defined() ? positions.stride(1) : 0, offset, cos.size(0), ys, xs, l, h, d, half,
             style == RopeStyle::interleaved, inverse);
    };
    visit_index(positions.defined() ? positions.dtype() : DType::i64, [&]<class I>() {
      if (wide)
        run.template operator()<V, I>();
      else
        run.template operator()<1, I>();
    });
  });
}

void linear_rope(Tensor& y, const Gemm& product, const Tensor& bias, int64_t rotated, const Tensor& cos, const Tensor& sin,
                 RopeStyle style, int64_t offset) {
  Tensor flat = y.view({y.size(0) * y.size(1), y.size(2) * y.size(3)}), none, first = y.slice(2, 0, rotated);
  if (style == RopeStyle::half && y.size(3) == 64 &&
      fused_rope(flat, product, bias, y.size(1), rotated, cos, sin, offset))
    return;
  linear_forward(flat, none, product, bias, Epilogue::none);
  if (first.numel() > 0) rope(first, first, cos, sin, style, none, offset, false);
}

}  // namespace krait::kernels::cuda

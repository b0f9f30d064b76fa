#include "core/cuda/launch.cuh"
#include "kernels/cuda/fft_conv.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kRun = 8;  // consecutive outputs of a thread: 8 values and 15 weights serve 64 products

// bounds (b, l, 2): first position of the document that holds t, and the one after its last. Segments ascend.
__global__ void document_bounds_kernel(int32_t* bounds, const int32_t* __restrict__ segments, int64_t l,
                                       int64_t total) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= total) return;
  const int32_t* row = segments + i / l * l;
  const int32_t own = segments[i];
  int64_t low = 0, high = i % l;  // the first position with own lies in [low, high]
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (row[middle] < own)
      low = middle + 1;
    else
      high = middle;
  }
  bounds[2 * i] = static_cast<int32_t>(low);
  low = i % l + 1, high = l;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (row[middle] <= own)
      low = middle + 1;
    else
      high = middle;
  }
  bounds[2 * i + 1] = static_cast<int32_t>(low);
}

// weights (lags, h): of lag i - zero; K and D for lags >= 0, K1 below. A channel's neighbours lie side by side.
template <class A>
__global__ void lag_weights_kernel(A* weights, const A* __restrict__ K, const A* __restrict__ K1,
                                   const A* __restrict__ D, int64_t lags, int64_t zero, int64_t h, int64_t lk,
                                   int64_t lk1) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= lags * h) return;
  const int64_t lag = i / h - zero, c = i % h;
  A w = A(0);
  if (lag >= 0 && lag < lk) w = K[c * lk + lag];
  if (lag == 0 && D) w += D[c];
  if (lag < 0 && K1 && -lag - 1 < lk1) w = K1[c * lk1 - lag - 1];
  weights[i] = w;
}

// y_i = sum_j weight(sign (i - j)) x_j over the positions j of i's document; with one_sided only sign (i - j) >= 0.
// Block: 32 channels x 8 runs of kRun positions. Grid: channel tiles x position tiles, b.
template <class T, class A>
__global__ void document_sum_kernel(T* y, const T* __restrict__ x, const A* __restrict__ weights,
                                    const int32_t* __restrict__ bounds, int64_t l, int64_t h, int64_t lags,
                                    int64_t zero, int sign, bool one_sided, int64_t tiles_c) {
  const int64_t c = blockIdx.x % tiles_c * 32 + threadIdx.x % 32;
  const int64_t i0 = (blockIdx.x / tiles_c * 8 + threadIdx.x / 32) * kRun, row = blockIdx.y;
  if (c >= h || i0 >= l) return;
  x += row * l * h + c;
  y += row * l * h + c;
  weights += c;
  bounds += row * l * 2;
  int64_t low[kRun], high[kRun];  // which j count for output i0 + k
  int64_t first = l, last = 0;
#pragma unroll
  for (int k = 0; k < kRun; ++k) {
    const int64_t i = i0 + k;
    low[k] = high[k] = 0;
    if (i >= l) continue;
    low[k] = one_sided && sign < 0 ? i : bounds[2 * i];
    high[k] = one_sided && sign > 0 ? i + 1 : bounds[2 * i + 1];
    first = min(first, low[k]);
    last = max(last, high[k]);
  }
  A sum[kRun] = {};
  for (int64_t j0 = first; j0 < last; j0 += kRun) {
    A value[kRun], w[2 * kRun - 1];
#pragma unroll
    for (int k = 0; k < kRun; ++k) value[k] = j0 + k < last ? static_cast<A>(x[(j0 + k) * h]) : A(0);
#pragma unroll
    for (int k = 0; k < 2 * kRun - 1; ++k) {  // distance i - j = i0 - j0 + k - (kRun - 1)
      const int64_t at = sign * (i0 - j0 + k - (kRun - 1)) + zero;
      w[k] = at >= 0 && at < lags ? weights[at * h] : A(0);
    }
#pragma unroll
    for (int k = 0; k < kRun; ++k)
#pragma unroll
      for (int j = 0; j < kRun; ++j)
        if (j0 + j >= low[k] && j0 + j < high[k]) sum[k] += w[k - j + kRun - 1] * value[j];
  }
#pragma unroll
  for (int k = 0; k < kRun; ++k)
    if (i0 + k < l) y[(i0 + k) * h] = static_cast<T>(sum[k]);
}

// dk[c, m] = sum_{b, t} a_t v_{t - m - offset} inside documents, t ascending. Block: 32 channels x 8 runs of lags.
template <class T, class A>
__global__ void document_lag_sum_kernel(A* dk, const T* __restrict__ a, const T* __restrict__ v,
                                        const int32_t* __restrict__ bounds, int64_t b, int64_t l, int64_t h,
                                        int64_t lk, int64_t offset, int64_t tiles_c) {
  const int64_t c = blockIdx.x % tiles_c * 32 + threadIdx.x % 32;
  const int64_t m0 = (blockIdx.x / tiles_c * 8 + threadIdx.x / 32) * kRun;
  if (c >= h || m0 >= lk) return;
  A sum[kRun] = {};
  for (int64_t row = 0; row < b; ++row) {
    const T *ar = a + row * l * h + c, *vr = v + row * l * h + c;
    for (int64_t begin = 0, end; begin < l; begin = end) {
      end = bounds[(row * l + begin) * 2 + 1];
      for (int64_t t0 = begin + m0 + offset; t0 < end; t0 += kRun) {
        A left[kRun], right[2 * kRun - 1];
#pragma unroll
        for (int k = 0; k < kRun; ++k) left[k] = t0 + k < end ? static_cast<A>(ar[(t0 + k) * h]) : A(0);
#pragma unroll
        for (int k = 0; k < 2 * kRun - 1; ++k) {
          const int64_t s = t0 - m0 - offset + k - (kRun - 1);
          right[k] = s >= begin && s < end ? static_cast<A>(vr[s * h]) : A(0);
        }
#pragma unroll
        for (int m = 0; m < kRun; ++m)
#pragma unroll
          for (int k = 0; k < kRun; ++k) sum[m] += left[k] * right[k - m + kRun - 1];
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kRun; ++m)
    if (m0 + m < lk) dk[c * lk + m0 + m] = sum[m];
}

Tensor bounds_of(const Tensor& segments) {
  const int64_t total = segments.numel();
  Tensor bounds = empty(segments.shape().inserted(2, 2), DType::i32, segments.device());
  launch(document_bounds_kernel, {.grid = ceil_div(total, 256), .stream = current_stream(segments.device())},
         bounds.data<int32_t>(), segments.data<int32_t>(), segments.size(1), total);
  return bounds;
}

struct LagWeights {
  Tensor values;
  int64_t zero;  // where lag 0 lies
  LagWeights(const Tensor& K, const Tensor& K1, const Tensor& D, int64_t l) : zero(K1.defined() ? l - 1 : 0) {
    const int64_t h = K.size(0), lags = zero + l;
    values = empty({lags, h}, K.dtype(), K.device());
    const auto make = [&]<class A>(A) {
      launch(lag_weights_kernel<A>, {.grid = ceil_div(lags * h, 256), .stream = current_stream(K.device())},
             values.data<A>(), K.data<A>(), K1.defined() ? K1.data<A>() : nullptr, D.defined() ? D.data<A>() : nullptr,
             lags, zero, h, K.size(1), K1.defined() ? K1.size(1) : int64_t{0});
    };
    K.dtype() == DType::f64 ? make(double{}) : make(float{});
  }
};

void document_sum(Tensor& y, const Tensor& x, const LagWeights& w, const Tensor& bounds, int sign, bool one_sided) {
  const int64_t b = x.size(0), l = x.size(1), h = x.size(2), tiles_c = ceil_div(h, 32);
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    launch(document_sum_kernel<T, A>,
           {.grid = tiles_c * ceil_div(l, 8 * kRun), .grid_y = b, .stream = current_stream(x.device())}, y.data<T>(),
           x.data<T>(), w.values.data<A>(), bounds.data<int32_t>(), l, h, w.values.size(0), w.zero, sign, one_sided,
           tiles_c);
  });
}

void document_lag_sum(Tensor& dk, const Tensor& a, const Tensor& v, const Tensor& bounds, int64_t offset) {
  const int64_t b = a.size(0), l = a.size(1), h = a.size(2), tiles_c = ceil_div(h, 32);
  visit_float(a.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    launch(document_lag_sum_kernel<T, A>,
           {.grid = tiles_c * ceil_div(dk.size(1), 8 * kRun), .stream = current_stream(a.device())}, dk.data<A>(),
           a.data<T>(), v.data<T>(), bounds.data<int32_t>(), b, l, h, dk.size(1), offset, tiles_c);
  });
}

}  // namespace

void document_conv_forward(Tensor& y, const Tensor& u, const Tensor& K, const Tensor& K1, const Tensor& D,
                           const Tensor& segments) {
  const LagWeights w(K, K1, D, u.size(1));
  document_sum(y, u, w, bounds_of(segments), 1, !K1.defined());
}

void document_conv_backward(Tensor& du, Tensor& dK, Tensor& dK1, const Tensor& dy, const Tensor& u, const Tensor& K,
                            const Tensor& K1, const Tensor& D, const Tensor& segments) {
  const LagWeights w(K, K1, D, u.size(1));
  const Tensor bounds = bounds_of(segments);
  document_sum(du, dy, w, bounds, -1, !K1.defined());
  document_lag_sum(dK, dy, u, bounds, 0);
  if (K1.defined()) document_lag_sum(dK1, u, dy, bounds, 1);  // dK1[m] = sum_s u_s dy_{s-m-1}
}

}  // namespace krait::kernels::cuda

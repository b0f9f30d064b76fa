#include "kernels/reduce.h"

#include "core/cuda/launch.cuh"
#include "kernels/cuda/block_reduce.cuh"

namespace krait::kernels::cuda {

namespace {

// As on the CPU, a reduction over (o, r, i) is cut into pieces by its shape alone; partial results (o, pieces, i)
// are reduced by a second launch. Bound by memory: one read of x.

template <class A>
struct Sum {
  using Second = Sum<A>;
  __device__ static A start() { return A(0); }
  __device__ static A take(A s, A x, A) { return s + x; }
  __device__ static A join(A s, A t) { return s + t; }
};
template <class A>
struct SumExp {
  using Second = Sum<A>;
  __device__ static A start() { return A(0); }
  __device__ static A take(A s, A x, A shift) { return s + ::exp(x - shift); }
  __device__ static A join(A s, A t) { return s + t; }
};
template <class A>
struct Max {
  using Second = Max<A>;
  __device__ static A start() { return -A(INFINITY); }
  __device__ static A take(A s, A x, A) { return s > x || s != s ? s : x; }
  __device__ static A join(A s, A t) { return take(s, t, A(0)); }
};
template <class A>
struct Min {
  using Second = Min<A>;
  __device__ static A start() { return A(INFINITY); }
  __device__ static A take(A s, A x, A) { return s < x || s != s ? s : x; }
  __device__ static A join(A s, A t) { return take(s, t, A(0)); }
};

// i = 1: a block reduces one piece of one row.
template <class R, class Y, class T, class A>
__global__ void reduce_row_kernel(Y* y, const T* x, const A* shift, int64_t r, int64_t piece, int64_t pieces, A scale) {
  __shared__ A shared[32];
  const int64_t row = int64_t{blockIdx.x} / pieces, k0 = int64_t{blockIdx.x} % pieces * piece;
  const int64_t k1 = k0 + piece < r ? k0 + piece : r;
  const A down = shift ? shift[row] : A(0);
  A s = R::start();
  for (int64_t k = k0 + threadIdx.x; k < k1; k += blockDim.x) s = R::take(s, static_cast<A>(x[row * r + k]), down);
  s = block_reduce(s, shared, [](A a, A b) { return R::join(a, b); });
  if (threadIdx.x == 0) y[blockIdx.x] = static_cast<Y>(s * scale);
}

// i > 1: 32 neighbouring columns, eight threads down each; blockIdx.y walks over the strips of columns.
constexpr int kDown = 8;
template <class R, class Y, class T, class A>
__global__ void reduce_column_kernel(Y* y, const T* x, const A* shift, int64_t r, int64_t i, int64_t piece,
                                     int64_t pieces, A scale) {
  __shared__ A shared[kDown][33];
  const int across = threadIdx.x % 32, down = threadIdx.x / 32;
  const int64_t o = int64_t{blockIdx.x} / pieces, k0 = int64_t{blockIdx.x} % pieces * piece;
  const int64_t k1 = k0 + piece < r ? k0 + piece : r;
  for (int64_t strip = blockIdx.y; strip * 32 < i; strip += gridDim.y) {
    const int64_t c = strip * 32 + across;
    A s = R::start();
    if (c < i) {
      const A by = shift ? shift[o * i + c] : A(0);
      for (int64_t k = k0 + down; k < k1; k += kDown) s = R::take(s, static_cast<A>(x[(o * r + k) * i + c]), by);
    }
    shared[down][across] = s;
    __syncthreads();
    if (down == 0 && c < i) {
      for (int d = 1; d < kDown; ++d) s = R::join(s, shared[d][across]);
      y[int64_t{blockIdx.x} * i + c] = static_cast<Y>(s * scale);
    }
    __syncthreads();
  }
}

template <class R, class Y, class T, class A>
void one_pass(Y* y, const T* x, const A* shift, int64_t o, int64_t r, int64_t i, int64_t piece, A scale,
              const Stream& stream) {
  const int64_t pieces = ceil_div(r, piece);
  if (i == 1)
    launch(reduce_row_kernel<R, Y, T, A>, {.grid = o * pieces, .block = r <= 256 ? 32 : 256, .stream = stream}, y, x,
           shift, r, piece, pieces, scale);
  else
    launch(reduce_column_kernel<R, Y, T, A>,
           {.grid = o * pieces, .grid_y = std::min<int64_t>(ceil_div(i, 32), 4096), .block = 32 * kDown, .stream = stream},
           y, x, shift, r, i, piece, pieces, scale);
}

// Pieces of at least 4096 values down a row (64 down a column), and no more of them than fill the GPU.
int64_t piece_of(int64_t o, int64_t r, int64_t i) {
  const int64_t blocks = o * (i == 1 ? 1 : ceil_div(i, 32)), wanted = std::max<int64_t>(1, 1024 / blocks);
  return std::max<int64_t>(i == 1 ? 4096 : 64, ceil_div(r, wanted));
}

template <template <class> class R>
void reduce(Tensor& y, const Tensor& x, const Tensor* shift, double scale) {
  const int64_t o = x.size(0), r = x.size(1), i = x.size(2), piece = piece_of(o, r, i), pieces = ceil_div(r, piece);
  const Stream stream = current_stream(x.device());
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const A* const down = shift ? shift->data<A>() : nullptr;
    const A by = static_cast<A>(scale);
    const auto into = [&]<class Y>(Y* out) {
      if (pieces == 1) {
        one_pass<R<A>>(out, x.data<T>(), down, o, r, i, piece, by, stream);
        return;
      }
      const Tensor partial = empty({o, pieces, i}, accum_dtype(x.dtype()), x.device());
      A* const middle = partial.data<A>();
      one_pass<R<A>>(middle, x.data<T>(), down, o, r, i, piece, A(1), stream);
      one_pass<typename R<A>::Second>(out, middle, static_cast<const A*>(nullptr), o, pieces, i, pieces, by, stream);
    };
    if (shift)
      into(y.data<A>());
    else
      into(y.data<T>());
  });
}

}  // namespace

void sum(Tensor& y, const Tensor& x, double scale) { reduce<Sum>(y, x, nullptr, scale); }
void amax(Tensor& y, const Tensor& x) { reduce<Max>(y, x, nullptr, 1.0); }
void amin(Tensor& y, const Tensor& x) { reduce<Min>(y, x, nullptr, 1.0); }
void sum_exp(Tensor& y, const Tensor& x, const Tensor& shift) { reduce<SumExp>(y, x, &shift, 1.0); }

namespace {

// The larger value, a NaN before all others, the smaller index among equals.
template <class A>
__device__ bool before(A v, int64_t i, A w, int64_t j) {
  const bool vn = v != v, wn = w != w;
  if (vn != wn) return vn;
  if (!vn && v != w) return v > w;
  return i < j;
}

template <class T>
__global__ void argmax_kernel(int64_t* y, const T* x, int64_t r) {
  using A = accum_t<T>;
  __shared__ A values[256];
  __shared__ int64_t indices[256];
  const T* const row = x + int64_t{blockIdx.x} * r;
  A value = -A(INFINITY);
  int64_t index = r;  // behind every real index
  for (int64_t k = threadIdx.x; k < r; k += blockDim.x) {
    const A v = static_cast<A>(row[k]);
    if (before(v, k, value, index)) value = v, index = k;
  }
  values[threadIdx.x] = value;
  indices[threadIdx.x] = index;
  __syncthreads();
  for (int half = 128; half > 0; half /= 2) {
    const int other = static_cast<int>(threadIdx.x) + half;
    if (static_cast<int>(threadIdx.x) < half &&
        before(values[other], indices[other], values[threadIdx.x], indices[threadIdx.x])) {
      values[threadIdx.x] = values[other];
      indices[threadIdx.x] = indices[other];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) y[blockIdx.x] = indices[0];
}

}  // namespace

void argmax(Tensor& y, const Tensor& x) {
  visit_float(x.dtype(), [&]<class T>() {
    launch(argmax_kernel<T>, {.grid = x.size(0), .stream = current_stream(x.device())}, y.data<int64_t>(), x.data<T>(),
           x.size(1));
  });
}

}  // namespace krait::kernels::cuda

#include "kernels/block_linear.h"

#include "core/cuda/launch.cuh"

namespace krait::kernels::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kChunk = 128;  // rows of one block of threads; their part of dw is made in one go

template <class T, int kSide>
struct alignas(sizeof(T) * kSide) Side {
  T at[kSide];
};

struct Rows {
  int64_t count, x, dy;  // rows, and how far apart those of x and dy lie
};

// Block n of the matrix.
template <class T, class A>
__device__ void load_block(A (&m)[4][4], const T* w, int n) {
#pragma unroll
  for (int o = 0; o < 4; ++o)
#pragma unroll
    for (int i = 0; i < 4; ++i) m[o][i] = static_cast<A>(w[(int64_t{n} * 4 + o) * 4 + i]);
}

// A thread has one 4 x 4 block of the matrix in registers and walks down a chunk of rows; neighbouring threads read
// neighbouring blocks. Bound by memory: 2 r c sizeof(T) bytes.
template <class T>
__global__ void __launch_bounds__(kThreads)
    forward_four_kernel(T* y, const T* x, const T* w, Rows rows, int blocks) {
  using A = accum_t<T>;
  const int n = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (n >= blocks) return;
  A m[4][4];
  load_block(m, w, n);
  const int64_t first = int64_t{blockIdx.y} * kChunk, last = first + kChunk < rows.count ? first + kChunk : rows.count;
#pragma unroll 4
  for (int64_t r = first; r < last; ++r) {
    const Side<T, 4> in = *reinterpret_cast<const Side<T, 4>*>(x + r * rows.x + int64_t{n} * 4);
    Side<T, 4> out;
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      A sum = A(0);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += m[o][i] * static_cast<A>(in.at[i]);
      out.at[o] = static_cast<T>(sum);
    }
    *reinterpret_cast<Side<T, 4>*>(y + (r * blocks + n) * 4) = out;
  }
}

// The same walk for both gradients; partial (chunks, blocks 16). Bound by memory: 3 r c sizeof(T) bytes.
template <class T>
__global__ void __launch_bounds__(kThreads)
    backward_four_kernel(T* dx, accum_t<T>* partial, const T* dy, const T* x, const T* w, Rows rows, int blocks) {
  using A = accum_t<T>;
  const int n = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (n >= blocks) return;
  A m[4][4], sums[4][4] = {};
  load_block(m, w, n);
  const int64_t first = int64_t{blockIdx.y} * kChunk, last = first + kChunk < rows.count ? first + kChunk : rows.count;
#pragma unroll 4
  for (int64_t r = first; r < last; ++r) {
    const Side<T, 4> g = *reinterpret_cast<const Side<T, 4>*>(dy + r * rows.dy + int64_t{n} * 4);
    const Side<T, 4> in = *reinterpret_cast<const Side<T, 4>*>(x + r * rows.x + int64_t{n} * 4);
    Side<T, 4> out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      A sum = A(0);
#pragma unroll
      for (int o = 0; o < 4; ++o) {
        sum += m[o][i] * static_cast<A>(g.at[o]);
        sums[o][i] += static_cast<A>(g.at[o]) * static_cast<A>(in.at[i]);
      }
      out.at[i] = static_cast<T>(sum);
    }
    if (dx) *reinterpret_cast<Side<T, 4>*>(dx + (r * blocks + n) * 4) = out;
  }
  if (!partial) return;
#pragma unroll
  for (int o = 0; o < 4; ++o)
#pragma unroll
    for (int i = 0; i < 4; ++i) partial[((int64_t{blockIdx.y} * blocks + n) * 4 + o) * 4 + i] = sums[o][i];
}

// Blocks of other sides: one thread for each output, and for each element of dx.
template <class T>
__global__ void product_kernel(T* y, const T* x, const T* w, int64_t rows, int64_t x_stride, int64_t blocks, int out,
                               int in, bool transposed) {
  using A = accum_t<T>;
  const int64_t width = blocks * out, stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < rows * width; at += stride) {
    const int64_t r = at / width, n = at % width / out, o = at % out;
    A sum = A(0);
    for (int i = 0; i < in; ++i)
      sum += static_cast<A>(transposed ? w[(n * in + i) * out + o] : w[(n * out + o) * in + i]) *
             static_cast<A>(x[r * x_stride + n * in + i]);
    y[at] = static_cast<T>(sum);
  }
}

// One thread for each element of the matrix and chunk of rows.
template <class T>
__global__ void weight_kernel(accum_t<T>* partial, const T* dy, const T* x, Rows rows, int64_t count, int out, int in) {
  using A = accum_t<T>;
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= count) return;
  const int64_t n = j / (out * in), o = j / in % out, i = j % in;
  const int64_t first = int64_t{blockIdx.y} * kChunk, last = first + kChunk < rows.count ? first + kChunk : rows.count;
  A sum = A(0);
  for (int64_t r = first; r < last; ++r)
    sum += static_cast<A>(dy[r * rows.dy + n * out + o]) * static_cast<A>(x[r * rows.x + n * in + i]);
  partial[int64_t{blockIdx.y} * count + j] = sum;
}

template <class A>
__global__ void total_kernel(A* dw, const A* partial, int64_t chunks, int64_t count, bool add) {
  const int64_t j = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (j >= count) return;
  A sum = add ? dw[j] : A(0);
#pragma unroll 8
  for (int64_t q = 0; q < chunks; ++q) sum += partial[q * count + j];
  dw[j] = sum;
}

template <class T>
bool four(const Tensor& w, std::initializer_list<const Tensor*> rows) {
  bool fits = w.size(1) == 4 && w.size(2) == 4;
  for (const Tensor* t : rows)
    fits = fits && (!t->defined() || (reinterpret_cast<uintptr_t>(t->raw_data()) % (4 * sizeof(T)) == 0 && t->stride(0) % 4 == 0));
  return fits;
}

int64_t grid_of(int64_t elements) { return std::min<int64_t>(ceil_div(elements, 256), 132 * 32); }

constexpr int64_t kMaxChunks = 65535;  // of one launch
void check_rows(int64_t rows) {
  KRAIT_CHECK(ceil_div(rows, kChunk) <= kMaxChunks, "block_linear: {} rows, at most {} on CUDA; use a smaller batch", rows,
              kMaxChunks * kChunk);
}

}  // namespace

void block_linear_forward(Tensor& y, const Tensor& x, const Tensor& w) {
  const int64_t rows = x.size(0), blocks = w.size(0);
  check_rows(rows);
  const Stream stream = current_stream(x.device());
  visit_float(x.dtype(), [&]<class T>() {
    if (four<T>(w, {&x, &y}))
      launch(forward_four_kernel<T>,
             {.grid = ceil_div(blocks, kThreads), .grid_y = ceil_div(rows, kChunk), .block = kThreads, .stream = stream},
             y.data<T>(), x.data<T>(), w.data<T>(), Rows{rows, x.stride(0), 0}, static_cast<int>(blocks));
    else
      launch(product_kernel<T>, {.grid = grid_of(y.numel()), .stream = stream}, y.data<T>(), x.data<T>(), w.data<T>(),
             rows, x.stride(0), blocks, static_cast<int>(w.size(1)), static_cast<int>(w.size(2)), false);
  });
}

void block_linear_backward(Tensor& dx, Tensor& dw, bool add_dw, const Tensor& dy, const Tensor& x, const Tensor& w) {
  const int64_t rows = x.size(0), blocks = w.size(0), chunks = ceil_div(rows, kChunk), count = w.numel();
  const int out = static_cast<int>(w.size(1)), in = static_cast<int>(w.size(2));
  check_rows(rows);
  const Stream stream = current_stream(x.device());
  const Rows layout{rows, x.stride(0), dy.stride(0)};
  visit_float(x.dtype(), [&]<class T>() {
    using A = accum_t<T>;
    const Tensor partial = dw.defined() ? empty({chunks, count}, dtype_of<A>, x.device()) : Tensor{};
    A* sums = dw.defined() ? partial.data<A>() : nullptr;
    T* to = dx.defined() ? dx.data<T>() : nullptr;
    if (four<T>(w, {&x, &dy, &dx})) {
      launch(backward_four_kernel<T>,
             {.grid = ceil_div(blocks, kThreads), .grid_y = chunks, .block = kThreads, .stream = stream}, to, sums,
             dy.data<T>(), x.data<T>(), w.data<T>(), layout, static_cast<int>(blocks));
    } else {
      if (to)
        launch(product_kernel<T>, {.grid = grid_of(dx.numel()), .stream = stream}, to, dy.data<T>(), w.data<T>(), rows,
               dy.stride(0), blocks, in, out, true);
      if (sums)
        launch(weight_kernel<T>, {.grid = ceil_div(count, 256), .grid_y = chunks, .stream = stream}, sums, dy.data<T>(),
               x.data<T>(), layout, count, out, in);
    }
    if (sums)
      launch(total_kernel<A>, {.grid = ceil_div(count, 256), .stream = stream}, dw.data<A>(), sums, chunks, count, add_dw);
  });
}

}  // namespace krait::kernels::cuda

#include "core/cuda/launch.cuh"
#include "kernels/sequence_pool.h"

namespace krait::kernels::cuda {

namespace {

constexpr int kChannels = 32, kRows = 16;  // of a block: threads along d and along t

__device__ int64_t length_of(const int32_t* lengths, int64_t row, int64_t l) {
  return lengths ? min(max(static_cast<int64_t>(lengths[row]), int64_t{1}), l) : l;
}

// One block per sequence and 32 channels. Thread row r sums t = r, r + 16, ...; the 16 sums are joined in order.
// Bound by memory: b l d sizeof(T) bytes.
template <class T>
__global__ void sequence_pool_forward_kernel(T* y, const T* x, const int32_t* lengths, int64_t l, int64_t d, Pool pool) {
  using A = accum_t<T>;
  __shared__ A partial[kRows][kChannels];
  const int64_t row = blockIdx.x, c = int64_t{blockIdx.y} * kChannels + threadIdx.x % kChannels;
  const int r = static_cast<int>(threadIdx.x) / kChannels;
  const int64_t n = length_of(lengths, row, l);
  const T* in = x + row * l * d;
  A sum = A(0);
  if (c < d) {
    if (pool == Pool::mean) {
      for (int64_t t = r; t < n; t += kRows) sum += static_cast<A>(in[t * d + c]);
      sum /= static_cast<A>(n);
    } else if (r == 0) {
      sum = static_cast<A>(in[(n - 1) * d + c]);
    }
  }
  partial[r][threadIdx.x % kChannels] = sum;
  __syncthreads();
  if (r != 0 || c >= d) return;
  for (int k = 1; k < kRows; ++k) sum += partial[k][threadIdx.x % kChannels];
  y[row * d + c] = static_cast<T>(sum);
}

template <class T>
__global__ void sequence_pool_backward_kernel(T* dx, const T* dy, const int32_t* lengths, int64_t l, int64_t d,
                                              int64_t total, Pool pool) {
  using A = accum_t<T>;
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= total) return;
  const int64_t row = i / (l * d), t = i / d % l, c = i % d, n = length_of(lengths, row, l);
  const A share = pool == Pool::mean ? (t < n ? A(1) / static_cast<A>(n) : A(0)) : A(t == n - 1 ? 1 : 0);
  dx[i] = static_cast<T>(share * static_cast<A>(dy[row * d + c]));
}

const int32_t* pointer(const Tensor& lengths) { return lengths.defined() ? lengths.data<int32_t>() : nullptr; }

}  // namespace

void sequence_pool_forward(Tensor& y, const Tensor& x, const Tensor& lengths, Pool pool) {
  const int64_t b = x.size(0), l = x.size(1), d = x.size(2);
  visit_float(x.dtype(), [&]<class T>() {
    launch(sequence_pool_forward_kernel<T>,
           {.grid = b, .grid_y = ceil_div(d, kChannels), .block = kChannels * kRows, .stream = current_stream(x.device())},
           y.data<T>(), x.data<T>(), pointer(lengths), l, d, pool);
  });
}

void sequence_pool_backward(Tensor& dx, const Tensor& dy, const Tensor& lengths, Pool pool) {
  const int64_t l = dx.size(1), d = dx.size(2), total = dx.numel();
  visit_float(dx.dtype(), [&]<class T>() {
    launch(sequence_pool_backward_kernel<T>,
           {.grid = ceil_div(total, 256), .block = 256, .stream = current_stream(dx.device())}, dx.data<T>(),
           dy.data<T>(), pointer(lengths), l, d, total, pool);
  });
}

}  // namespace krait::kernels::cuda

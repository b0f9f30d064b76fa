#include "kernels/ssm_gradients.h"

#include "core/cuda/launch.cuh"
#include "kernels/visit_wide.h"

namespace krait::kernels::cuda {

namespace {

// One warp a channel.
template <class T>
__global__ void sum_states_kernel(T* dlog_dt, const double* all, int64_t h, int64_t n, int64_t fields) {
  const int64_t c = int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32;
  if (c >= h) return;
  double sum = 0;
  for (int64_t j = threadIdx.x % 32; j < n; j += 32) sum += all[(c * n + j) * fields + 4];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
  if (threadIdx.x % 32 == 0) dlog_dt[c] = static_cast<T>(sum);
}

// Block (8 neighbours of a set's states x fields, set) x 32 shares of the set's channels.
constexpr int kColumns = 8, kShares = 32;
template <class T>
__global__ void __launch_bounds__(kColumns * kShares)
    sum_channels_kernel(T* dlog_A_re, T* dA_im, T* dB, T* dP, const double* all, int64_t n, int64_t fields,
                        int64_t group) {
  __shared__ double sums[kShares][kColumns];
  const int column = threadIdx.x % kColumns, share = threadIdx.x / kColumns;
  const int64_t set = blockIdx.y, i = int64_t{blockIdx.x} * kColumns + column;
  double sum = 0;
  if (i < n * fields) {
#pragma unroll 4
    for (int64_t c = share; c < group; c += kShares) sum += all[(set * group + c) * n * fields + i];
  }
  sums[share][column] = sum;
  __syncthreads();
  const int64_t field = i % fields, j = i / fields, rank = (fields - 5) / 2;
  if (share != 0 || i >= n * fields || field == 4) return;
  for (int k = 1; k < kShares; ++k) sum += sums[k][column];
  const T value = static_cast<T>(sum);
  const int64_t at = set * n + j;
  if (field == 0)
    dlog_A_re[at] = value;
  else if (field == 1)
    dA_im[at] = value;
  else if (field < 4)
    dB[2 * at + field - 2] = value;
  else
    dP[((set * rank + (field - 5) / 2) * n + j) * 2 + (field - 5) % 2] = value;
}

}  // namespace

void ssm_sum_gradients(Tensor& dlog_dt, Tensor& dlog_A_re, Tensor& dA_im, Tensor& dB, Tensor& dP,
                       const Tensor& contributions) {
  const int64_t h = contributions.size(0), n = contributions.size(1), fields = contributions.size(2);
  const int64_t s = dlog_A_re.size(0);
  const Stream stream = current_stream(contributions.device());
  const double* all = contributions.data<double>();
  visit_wide(dlog_dt.dtype(), [&]<class T>() {
    launch(sum_states_kernel<T>, {.grid = ceil_div(h, 4), .block = 128, .stream = stream}, dlog_dt.data<T>(), all, h, n,
           fields);
    // sets in y: at most 65535 of them
    launch(sum_channels_kernel<T>,
           {.grid = ceil_div(n * fields, kColumns), .grid_y = s, .block = kColumns * kShares, .stream = stream},
           dlog_A_re.data<T>(), dA_im.data<T>(), dB.data<T>(), fields > 5 ? dP.data<T>() : nullptr, all, n, fields,
           h / s);
  });
}

}  // namespace krait::kernels::cuda

#include "kernels/ssm_gradients.h"

#include "core/cuda/launch.cuh"

namespace krait::kernels::cuda {

namespace {

// One thread per channel, in order of the states.
template <class T>
__global__ void sum_states_kernel(T* dlog_dt, const double* all, int64_t h, int64_t n, int64_t fields) {
  const int64_t c = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (c >= h) return;
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += all[(c * n + j) * fields + 4];
  dlog_dt[c] = static_cast<T>(sum);
}

// One thread per (set, state, field), in order of the set's channels; neighbours read neighbouring fields.
template <class T>
__global__ void sum_channels_kernel(T* dlog_A_re, T* dA_im, T* dB, T* dP, const double* all, int64_t s, int64_t n,
                                    int64_t fields, int64_t group) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= s * n * fields) return;
  const int64_t field = i % fields, j = i / fields % n, set = i / fields / n, rank = (fields - 5) / 2;
  if (field == 4) return;
  double sum = 0;
  for (int64_t c = set * group; c < (set + 1) * group; ++c) sum += all[(c * n + j) * fields + field];
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
    launch(sum_states_kernel<T>, {.grid = ceil_div(h, 64), .block = 64, .stream = stream}, dlog_dt.data<T>(), all, h, n,
           fields);
    launch(sum_channels_kernel<T>, {.grid = ceil_div(s * n * fields, 128), .block = 128, .stream = stream},
           dlog_A_re.data<T>(), dA_im.data<T>(), dB.data<T>(), fields > 5 ? dP.data<T>() : nullptr, all, s, n, fields,
           h / s);
  });
}

}  // namespace krait::kernels::cuda

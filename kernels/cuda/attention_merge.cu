#include "kernels/attention_merge.h"

#include "core/cuda/launch.cuh"

namespace krait::kernels::cuda {

// One warp a row (b, l, h). Bound by memory.
template <class T>
__global__ void attention_merge_kernel(accum_t<T>* o, accum_t<T>* lse, const T* part, const accum_t<T>* other,
                                       int64_t rows, int64_t l, int64_t h, int64_t d) {
  using A = accum_t<T>;
  const int64_t row = int64_t{blockIdx.x} * 8 + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t at = (row / (l * h) * h + row % h) * l + row / h % l;
  const A a = lse[at], b = other[at], top = a > b ? a : b;
  if (isinf(top) && top < A(0)) return;  // the same for the whole warp
  const A x = exp(a - top), y = exp(b - top), sum = x + y, keep = x / sum, add = y / sum;
  __syncwarp();  // all have read lse
  for (int64_t c = threadIdx.x % 32; c < d; c += 32) {
    const int64_t i = row * d + c;
    o[i] = keep * o[i] + add * static_cast<A>(part[i]);
  }
  if (threadIdx.x % 32 == 0) lse[at] = top + log(sum);
}

void attention_merge(Tensor& o, Tensor& lse, const Tensor& o_part, const Tensor& lse_part) {
  const int64_t rows = lse.numel();
  visit_float(o_part.dtype(), [&]<class T>() {
    launch(attention_merge_kernel<T>, {.grid = ceil_div(rows, 8), .stream = current_stream(o.device())},
           o.data<accum_t<T>>(), lse.data<accum_t<T>>(), o_part.data<T>(), lse_part.data<accum_t<T>>(), rows,
           o.size(1), o.size(2), o.size(3));
  });
}

}  // namespace krait::kernels::cuda

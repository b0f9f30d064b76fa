#include "kernels/accumulate.h"

#include "core/cuda/launch.cuh"

namespace krait::kernels::cuda {

// Bound by memory: n (2 sizeof(D) + sizeof(S)) bytes.
template <class D, class S>
__global__ void accumulate_kernel(D* dst, const S* src, int64_t n) {
  using A = std::conditional_t<std::is_same_v<D, double> || std::is_same_v<S, double>, double, float>;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += stride)
    dst[i] = static_cast<D>(static_cast<A>(dst[i]) + static_cast<A>(src[i]));
}

void accumulate(Tensor& dst, const Tensor& src) {
  const int64_t n = dst.numel();
  visit_float(dst.dtype(), [&]<class D>() {
    visit_float(src.dtype(), [&]<class S>() {
      launch(accumulate_kernel<D, S>,
             {.grid = std::min<int64_t>(ceil_div(n, 256), 132 * 16), .stream = current_stream(dst.device())},
             dst.data<D>(), src.data<S>(), n);
    });
  });
}

}  // namespace krait::kernels::cuda

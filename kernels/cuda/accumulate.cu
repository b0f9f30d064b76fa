#include "kernels/accumulate.h"

#include "core/cuda/launch.cuh"
#include "kernels/cuda/packed.cuh"

namespace krait::kernels::cuda {

namespace {

// Groups of V neighbouring elements; what is left over one by one. Bound by memory: n (2 sizeof(D) + sizeof(S)) bytes.
template <class D, class S, int V>
__global__ void accumulate_kernel(D* dst, const S* src, int64_t n) {
  using A = std::conditional_t<std::is_same_v<D, double> || std::is_same_v<S, double>, double, float>;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x, first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < n / V; i += stride) {
    Packed<D, V> sum;
    A to[V], from[V];
    sum.load(dst + i * V);
    sum.unpack(to);
    load_values(from, src + i * V);
#pragma unroll
    for (int k = 0; k < V; ++k) to[k] += from[k];
    sum.pack(to);
    sum.store(dst + i * V);
  }
  for (int64_t i = n / V * V + first; i < n; i += stride)
    dst[i] = static_cast<D>(static_cast<A>(dst[i]) + static_cast<A>(src[i]));
}

}  // namespace

void accumulate(Tensor& dst, const Tensor& src) {
  const int64_t n = dst.numel();
  const bool aligned = aligned16(dst.raw_data(), src.raw_data());
  visit_float(dst.dtype(), [&]<class D>() {
    visit_float(src.dtype(), [&]<class S>() {
      const auto with = [&]<int V>() {
        launch(accumulate_kernel<D, S, V>,
               {.grid = std::min<int64_t>(ceil_div(ceil_div(n, V), 256), 132 * 16), .stream = current_stream(dst.device())},
               dst.data<D>(), src.data<S>(), n);
      };
      if (aligned)
        with.template operator()<8>();
      else
        with.template operator()<1>();
    });
  });
}

}  // namespace krait::kernels::cuda

#include "kernels/set_scalars.h"

#include "core/cuda/launch.cuh"

namespace krait::kernels::cuda {

namespace {
struct Values {
  double at[4];
};
}  // namespace

static __global__ void set_scalars_kernel(double* dst, Values values, int n) {
  if (static_cast<int>(threadIdx.x) < n) dst[threadIdx.x] = values.at[threadIdx.x];
}

void set_scalars(const Tensor& dst, const Scalars& values) {
  launch(set_scalars_kernel, {.grid = 1, .block = 32, .stream = current_stream(dst.device())}, dst.data<double>(),
         Values{{values[0], values[1], values[2], values[3]}}, static_cast<int>(dst.numel()));
}

}  // namespace krait::kernels::cuda

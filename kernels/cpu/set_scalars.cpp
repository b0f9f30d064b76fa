#include "kernels/set_scalars.h"

#include <algorithm>

namespace krait::kernels::cpu {

void set_scalars(const Tensor& dst, const Scalars& values) {
  std::copy_n(values.begin(), dst.numel(), dst.data<double>());
}

}  // namespace krait::kernels::cpu

#include "kernels/set_scalars.h"

#include <algorithm>

namespace krait::kernels {

void set_scalars(const Tensor& dst, std::span<const double> values) {
  Scalars padded{};
  KRAIT_CHECK(dst.dtype() == DType::f64 && dst.ndim() == 1 && dst.is_contiguous() &&
                  dst.numel() == static_cast<int64_t>(values.size()) && values.size() <= padded.size(),
              "set_scalars: {} cannot take {} values", describe(dst), values.size());
  std::copy(values.begin(), values.end(), padded.begin());
  KRAIT_DISPATCH(dst.device(), set_scalars(dst, padded));
}

}  // namespace krait::kernels

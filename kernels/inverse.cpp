#include "kernels/inverse.h"

namespace krait::kernels {

Tensor batched_inverse(const Tensor& a) {
  KRAIT_CHECK(a.ndim() == 3 && a.size(1) == a.size(2), "batched_inverse: {}, expected (b, n, n)", a.shape());
  KRAIT_CHECK(a.dtype() == DType::f64, "batched_inverse: {}, expected float64", a.dtype());
  Tensor out = a.clone(), swaps = empty({a.size(0), a.size(1)}, DType::i32, a.device());
  if (out.numel() > 0) KRAIT_DISPATCH(out.device(), batched_inverse(out, swaps));
  return out;
}

}  // namespace krait::kernels

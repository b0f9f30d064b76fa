#include "kernels/accumulate.h"

namespace krait::kernels {

void accumulate(Tensor& dst, const Tensor& src) {
  KRAIT_CHECK(dst.shape() == src.shape() && dst.device() == src.device(), "accumulate: {} += {}", describe(dst),
              describe(src));
  if (!dst.is_contiguous()) {
    Tensor packed = dst.contiguous();
    accumulate(packed, src);
    copy_(dst, packed);
    return;
  }
  KRAIT_DISPATCH(dst.device(), accumulate(dst, src.contiguous()));
}

}  // namespace krait::kernels

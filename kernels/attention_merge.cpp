#include "kernels/attention_merge.h"

namespace krait::kernels {

void attention_merge(Tensor& o, Tensor& lse, const Tensor& o_part, const Tensor& lse_part) {
  KRAIT_CHECK(o.ndim() == 4 && o_part.shape() == o.shape() && o.dtype() == accum_dtype(o_part.dtype()),
              "attention_merge: o is {}, a part {}", describe(o), describe(o_part));
  check_same("attention_merge", o, lse, lse_part);
  KRAIT_CHECK(lse.shape() == (Shape{o.size(0), o.size(2), o.size(1)}) && lse_part.shape() == lse.shape(),
              "attention_merge: lse is {}, of a part {}, o {}", lse.shape(), lse_part.shape(), o.shape());
  KRAIT_CHECK(o.is_contiguous() && lse.is_contiguous(), "attention_merge: o and lse must be contiguous");
  if (lse.numel() == 0) return;
  KRAIT_DISPATCH(o.device(), attention_merge(o, lse, o_part.contiguous(), lse_part.contiguous()));
}

}  // namespace krait::kernels

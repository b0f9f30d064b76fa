#include "kernels/dropout.h"

namespace krait::kernels {

namespace {

Tensor run(const Tensor& x, const Tensor& residual, const DropoutMask& mask) {
  KRAIT_CHECK(mask.p >= 0.0 && mask.p < 1.0, "dropout: p is {}, expected 0 <= p < 1", mask.p);
  KRAIT_CHECK(mask.offset >= 0, "dropout: negative element offset {}", mask.offset);
  KRAIT_CHECK(mask.run >= 0 && mask.runs >= 1 && (mask.run == 0 || x.numel() % mask.run == 0),
              "dropout: {} elements are not runs of {} ({} in a group)", x.numel(), mask.run, mask.runs);
  KRAIT_CHECK(mask.step.defined() && mask.step.dtype() == DType::i64 && mask.step.numel() == 1 &&
                  mask.step.device() == x.device(),
              "dropout: the step is {}, expected an int64 scalar on {}; set current_random().step",
              describe(mask.step), x.device());
  Tensor y = empty_like(x);
  if (y.numel() > 0) KRAIT_DISPATCH(x.device(), dropout(y, x.contiguous(), residual, mask));
  return y;
}

}  // namespace

Tensor dropout(const Tensor& x, const DropoutMask& mask) { return run(x, {}, mask); }

Tensor dropout_add(const Tensor& x, const Tensor& residual, const DropoutMask& mask) {
  check_same("dropout_add", x, residual);
  KRAIT_CHECK(x.shape() == residual.shape(), "dropout_add: x {} does not match the residual {}", x.shape(),
              residual.shape());
  return run(x, residual.contiguous(), mask);
}

}  // namespace krait::kernels

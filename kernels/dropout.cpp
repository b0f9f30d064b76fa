#include "kernels/dropout.h"

namespace krait::kernels {

void check_mask(const char* op, const Tensor& x, const DropoutMask& mask) {
  KRAIT_CHECK(mask.p >= 0.0 && mask.p < 1.0, "{}: p is {}, expected 0 <= p < 1", op, mask.p);
  KRAIT_CHECK(mask.offset >= 0, "{}: negative element offset {}", op, mask.offset);
  KRAIT_CHECK(mask.run >= 0 && mask.runs >= 1 && (mask.run == 0 || x.numel() % mask.run == 0),
              "{}: {} elements are not runs of {} ({} in a group)", op, x.numel(), mask.run, mask.runs);
  KRAIT_CHECK(mask.step.defined() && mask.step.dtype() == DType::i64 && mask.step.numel() == 1 &&
                  mask.step.device() == x.device(),
              "{}: the step is {}, expected an int64 scalar on {}; set current_random().step", op, describe(mask.step),
              x.device());
}

namespace {

Tensor run(const Tensor& x, const Tensor& residual, const DropoutMask& mask) {
  check_mask("dropout", x, mask);
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

#include "kernels/sequence_pool.h"

namespace krait::kernels {

namespace {

void check_lengths(const Tensor& lengths, int64_t b, Device device) {
  if (!lengths.defined()) return;
  KRAIT_CHECK(lengths.dtype() == DType::i32 && lengths.shape() == Shape{b} && lengths.device() == device,
              "sequence_pool: lengths is {}, expected i32 ({}) on {}", describe(lengths), b, device);
}

}  // namespace

Tensor sequence_pool_forward(const Tensor& x_in, const Tensor& lengths, Pool pool) {
  KRAIT_CHECK(x_in.ndim() == 3 && x_in.size(1) > 0, "sequence_pool: x is {}, expected (b, l, d) with l > 0",
              x_in.shape());
  check_lengths(lengths, x_in.size(0), x_in.device());
  const Tensor x = x_in.contiguous();
  Tensor y = empty({x.size(0), x.size(2)}, x.dtype(), x.device());
  KRAIT_DISPATCH(x.device(), sequence_pool_forward(y, x, lengths.defined() ? lengths.contiguous() : lengths, pool));
  return y;
}

Tensor sequence_pool_backward(const Tensor& dy, const Tensor& lengths, int64_t length, Pool pool) {
  KRAIT_CHECK(dy.ndim() == 2, "sequence_pool: dy is {}, expected (b, d)", dy.shape());
  check_lengths(lengths, dy.size(0), dy.device());
  Tensor dx = empty({dy.size(0), length, dy.size(1)}, dy.dtype(), dy.device());
  KRAIT_DISPATCH(dy.device(), sequence_pool_backward(dx, dy.contiguous(),
                                                     lengths.defined() ? lengths.contiguous() : lengths, pool));
  return dx;
}

}  // namespace krait::kernels

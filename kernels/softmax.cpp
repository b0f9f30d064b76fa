#include "kernels/softmax.h"

namespace krait::kernels {

namespace {

Tensor rows(const Tensor& t) { return t.contiguous().view({-1, t.size(-1)}); }

void check_input(std::string_view name, const Tensor& x) {
  KRAIT_CHECK(x.ndim() > 0, "{}: a scalar has no last dimension", fmt::string_view(name.data(), name.size()));
}

void check_pair(std::string_view name, const Tensor& dy, const Tensor& y) {
  check_same(name, dy, y);
  KRAIT_CHECK(dy.shape() == y.shape(), "{}: dy {} does not match y {}", fmt::string_view(name.data(), name.size()),
              dy.shape(), y.shape());
}

}  // namespace

Tensor softmax_forward(const Tensor& x) {
  check_input("softmax", x);
  Tensor y = empty_like(x);
  if (x.numel() == 0) return y;
  Tensor out = rows(y);
  KRAIT_DISPATCH(x.device(), softmax_forward(out, rows(x)));
  return y;
}

Tensor softmax_backward(const Tensor& dy, const Tensor& y) {
  check_pair("softmax", dy, y);
  Tensor dx = empty_like(y);
  if (y.numel() == 0) return dx;
  Tensor out = rows(dx);
  KRAIT_DISPATCH(y.device(), softmax_backward(out, rows(dy), rows(y)));
  return dx;
}

Tensor log_softmax_forward(const Tensor& x) {
  check_input("log_softmax", x);
  Tensor y = empty_like(x);
  if (x.numel() == 0) return y;
  Tensor out = rows(y);
  KRAIT_DISPATCH(x.device(), log_softmax_forward(out, rows(x)));
  return y;
}

Tensor log_softmax_backward(const Tensor& dy, const Tensor& y) {
  check_pair("log_softmax", dy, y);
  Tensor dx = empty_like(y);
  if (y.numel() == 0) return dx;
  Tensor out = rows(dx);
  KRAIT_DISPATCH(y.device(), log_softmax_backward(out, rows(dy), rows(y)));
  return dx;
}

}  // namespace krait::kernels

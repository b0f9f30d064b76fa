#include "kernels/gather.h"

namespace krait::kernels {

namespace {

void check_index(const Shape& x, int64_t dim, const Tensor& index) {
  KRAIT_CHECK(index.dtype() == DType::i64, "gather: the index is {}, expected int64", describe(index));
  KRAIT_CHECK(x.ndim() > 0 && index.ndim() == x.ndim() && x.with(dim, index.size(dim)) == index.shape(),
              "gather: index {} does not match {} outside dimension {}", index.shape(), x, dim);
}

// Joined to (o, size of dim, i). The index stays a view where its strides allow it.
Tensor as_three(const Tensor& t, int64_t dim) {
  int64_t o = 1, i = 1;
  for (int64_t d = 0; d < t.ndim(); ++d) {
    if (d < dim) o *= t.size(d);
    if (d > dim) i *= t.size(d);
  }
  return t.reshape({o, t.size(dim), i});
}

}  // namespace

Tensor gather_forward(const Tensor& x, int64_t dim_in, const Tensor& index) {
  const int64_t dim = x.shape().wrap(dim_in);
  check_index(x.shape(), dim, index);
  Tensor y = empty(index.shape(), x.dtype(), x.device());
  if (y.numel() == 0) return y;
  KRAIT_CHECK(index.device() == x.device(), "gather: index on {}, x on {}", index.device(), x.device());
  Tensor out = as_three(y, dim);
  KRAIT_DISPATCH(x.device(), gather_forward(out, as_three(x.contiguous(), dim), as_three(index, dim)));
  return y;
}

Tensor gather_backward(const Tensor& dy, int64_t dim_in, const Tensor& index, const Shape& shape) {
  const int64_t dim = shape.wrap(dim_in);
  check_index(shape, dim, index);
  KRAIT_CHECK(dy.shape() == index.shape(), "gather: dy {} does not match the index {}", dy.shape(), index.shape());
  Tensor dx = zeros(shape, accum_dtype(dy.dtype()), dy.device());
  if (dy.numel() > 0) {
    Tensor out = as_three(dx, dim);
    KRAIT_DISPATCH(dy.device(), gather_backward(out, as_three(dy.contiguous(), dim), as_three(index, dim)));
  }
  return dx.to(dy.dtype());
}

}  // namespace krait::kernels

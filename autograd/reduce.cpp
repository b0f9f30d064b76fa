#include "autograd/reduce.h"

#include "kernels/elementwise.h"
#include "kernels/reduce.h"

namespace krait::autograd {

namespace k = kernels;

namespace {
// A reduced tensor seen again in the shape of what was reduced, without copying.
Tensor spread(const Tensor& t, const Shape& shape, const Dims& dims) {
  return t.reshape(k::reduced_shape(shape, dims, true)).expand(shape);
}
}  // namespace

Variable sum(const Variable& x, const Dims& dims, bool keep) {
  return record("sum", {x}, k::sum(x.data(), dims, keep),
                [shape = x.shape(), dims](const Tensor& dy) -> Grads { return {spread(dy, shape, dims).contiguous()}; });
}

Variable mean(const Variable& x, const Dims& dims, bool keep) {
  return record("mean", {x}, k::mean(x.data(), dims, keep), [shape = x.shape(), dims](const Tensor& dy) -> Grads {
    const double share = static_cast<double>(dy.numel()) / static_cast<double>(std::max<int64_t>(shape.numel(), 1));
    return {k::mul_scalar(spread(dy, shape, dims), share)};
  });
}

Variable amax(const Variable& x, const Dims& dims, bool keep) {
  const Tensor y = k::amax(x.data(), dims, keep);
  return record("amax", {x}, y, [x = x.data(), y, dims](const Tensor& dy) -> Grads {
    const Tensor mask = k::equal(x, spread(y, x.shape(), dims));
    const Tensor zero = zeros({}, x.dtype(), x.device()), one = ones({}, x.dtype(), x.device());
    const Tensor hits = k::where(mask, one, zero);  // counted in fp32, so that bf16 counts above 256 are exact
    const DType wide = accum_dtype(x.dtype());
    const Tensor share = k::div(dy.reshape(y.shape()).to(wide), k::sum(hits.to(wide), dims).reshape(y.shape()));
    return {k::where(mask, spread(share.to(x.dtype()), x.shape(), dims), zero)};
  });
}

Variable logsumexp(const Variable& x, const Dims& dims, bool keep) {
  const Tensor y = k::logsumexp(x.data(), dims, keep);
  return record("logsumexp", {x}, y, [x = x.data(), y, dims](const Tensor& dy) -> Grads {
    return {k::mul(spread(dy, x.shape(), dims), k::exp(k::sub(x, spread(y, x.shape(), dims))))};
  });
}

}  // namespace krait::autograd

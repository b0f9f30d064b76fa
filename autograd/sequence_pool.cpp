#include "autograd/sequence_pool.h"

#include "autograd/collective.h"
#include "autograd/elementwise.h"
#include "autograd/reduce.h"
#include "autograd/shape.h"
#include "kernels/elementwise.h"

namespace krait {
inline namespace autograd {

Variable sequence_pool(const Variable& x, const Tensor& lengths, Pool pool) {
  const Tensor y = kernels::sequence_pool_forward(x.data(), lengths, pool);
  return record("sequence_pool", {x}, y, [lengths, pool, l = x.size(1)](const Tensor& dy) -> Grads {
    return {kernels::sequence_pool_backward(dy, lengths, l, pool)};
  });
}

Variable sequence_pool(const Variable& x, const Tensor& lengths, Pool pool, const comm::GroupPtr& group) {
  if (group->size() == 1) return sequence_pool(x, lengths, pool);
  KRAIT_CHECK(x.ndim() == 3, "sequence_pool: x is {}, expected (b, l, d)", x.shape());
  const int64_t b = x.size(0), l = x.size(1), whole = group->size() * l;
  const DType wide = accum_dtype(x.dtype());
  const Tensor n = lengths.defined() ? kernels::clamp(lengths.to(wide), 1, static_cast<double>(whole)).view({b, 1})
                                     : full({b, 1}, static_cast<double>(whole), wide, x.device());
  const Tensor position = kernels::add_scalar(arange(l, wide, x.device()), static_cast<double>(group->rank() * l));
  // What each position counts for: (b, l).
  const Tensor weight = pool == Pool::mean ? kernels::div(kernels::less(position, n).to(wide), n)
                                           : kernels::equal(position, kernels::add_scalar(n, -1)).to(wide);
  const Variable own = sum(cast(x, wide) * Variable(weight.view({b, l, 1})), 1);
  return cast(copy_to_group(reduce_from_group(own, group), group), x.dtype());
}

}  // namespace autograd
}  // namespace krait

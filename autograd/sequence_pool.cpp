#include "autograd/sequence_pool.h"

#include "autograd/collective.h"
#include "autograd/elementwise.h"
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
  const int64_t b = x.size(0), l = x.size(1);
  const DType wide = accum_dtype(x.dtype());
  const auto before = static_cast<double>(group->rank() * l), last = static_cast<double>(l);
  const Tensor n = lengths.defined() ? kernels::clamp(lengths.to(wide), 1, last * group->size())
                                     : full({b}, last * group->size(), wide, x.device());
  // A weight a row, not a position: the piece is read once, by the pool's own kernel.
  const Tensor ahead = kernels::add_scalar(n, -before), here = kernels::clamp(ahead, 0, last);  // positions of this piece that count
  const Variable part = sequence_pool(cast(x, wide), kernels::clamp(here, 1, last).to(DType::i32), pool);
  // Its share of the whole; of the last position: whether it lies here.
  const Tensor weight = pool == Pool::mean ? kernels::div(here, n)
                                           : kernels::mul(kernels::clamp(here, 0, 1), kernels::equal(here, ahead).to(wide));
  const Variable own = part * Variable(weight.view({b, 1}));
  return cast(copy_to_group(reduce_from_group(own, group), group), x.dtype());
}

}  // namespace autograd
}  // namespace krait

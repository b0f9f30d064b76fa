#include "autograd/sequence_pool.h"

namespace krait {
inline namespace autograd {

Variable sequence_pool(const Variable& x, const Tensor& lengths, Pool pool) {
  const Tensor y = kernels::sequence_pool_forward(x.data(), lengths, pool);
  return record("sequence_pool", {x}, y, [lengths, pool, l = x.size(1)](const Tensor& dy) -> Grads {
    return {kernels::sequence_pool_backward(dy, lengths, l, pool)};
  });
}

}  // namespace autograd
}  // namespace krait

#include "autograd/dropout.h"

#include "autograd/elementwise.h"
#include "kernels/dropout.h"

namespace krait::autograd {

namespace {
kernels::DropoutMask mask_for(const Variable& x, double p, std::string_view stream) {
  const RandomSource& source = current_random();
  const int64_t per_sequence = x.ndim() == 0 || x.size(0) == 0 ? 1 : x.data().numel() / x.size(0);
  return {p, random_key(source.seed, stream), source.step, source.batch_offset * per_sequence};
}
}  // namespace

Variable dropout(const Variable& x, double p, std::string_view stream) {
  if (p == 0.0) return x;
  const auto mask = mask_for(x, p, stream);
  return record("dropout", {x}, kernels::dropout(x.data(), mask),
                [mask](const Tensor& dy) -> Grads { return {kernels::dropout(dy, mask)}; });
}

Variable dropout_add(const Variable& x, const Variable& residual, double p, std::string_view stream) {
  if (p == 0.0) return add(residual, x);
  const auto mask = mask_for(x, p, stream);
  return record("dropout_add", {x, residual}, kernels::dropout_add(x.data(), residual.data(), mask),
                [mask, wanted = x.requires_grad()](const Tensor& dy) -> Grads {
                  return {wanted ? kernels::dropout(dy, mask) : Tensor(), dy};
                });
}

}  // namespace krait::autograd

#include "kernels/sgd.h"

#include "kernels/cuda/flat_update.cuh"

namespace krait::kernels::cuda {

void sgd_(const FlatUpdate& u, const Tensor& velocity, const OptimizerSegments& segments, const SgdOptions& options) {
  visit_update(u, [&]<class P, class G>() {
    if (velocity.defined())
      flat_update<SgdRule<P, true>, P, G>(u, velocity, {}, segments, options);
    else
      flat_update<SgdRule<P, false>, P, G>(u, {}, {}, segments, options);
  });
}

}  // namespace krait::kernels::cuda

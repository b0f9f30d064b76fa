#include "kernels/adamw.h"

#include "kernels/cuda/flat_update.cuh"

namespace krait::kernels::cuda {

void adamw_(const FlatUpdate& u, const Tensor& exp_avg, const Tensor& exp_avg_sq, const OptimizerSegments& segments,
            const AdamWOptions& options) {
  visit_update(u, [&]<class P, class G>() {
    flat_update<AdamWRule<P>, P, G>(u, exp_avg, exp_avg_sq, segments, options);
  });
}

}  // namespace krait::kernels::cuda

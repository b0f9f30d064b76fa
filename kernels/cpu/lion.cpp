#include "kernels/lion.h"

#include "kernels/cpu/flat_update.h"

namespace krait::kernels::cpu {

void lion_(const FlatUpdate& u, const Tensor& exp_avg, const OptimizerSegments& segments,
           const LionOptions& options) {
  visit_update(u, [&]<class P, class G>() { flat_update<LionRule<P>, P, G>(u, exp_avg, {}, segments, options); });
}

}  // namespace krait::kernels::cpu

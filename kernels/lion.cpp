#include "kernels/lion.h"

namespace krait::kernels {

void lion_(const FlatUpdate& u, const Tensor& exp_avg, const OptimizerSegments& segments, const LionOptions& o) {
  KRAIT_CHECK(o.beta1 >= 0 && o.beta1 < 1 && o.beta2 >= 0 && o.beta2 < 1, "lion: betas {}, {} must be in [0, 1)",
              o.beta1, o.beta2);
  check_flat_update("lion", u, {exp_avg}, segments);
  KRAIT_DISPATCH(u.param.device(), lion_(u, exp_avg, segments, o));
}

}  // namespace krait::kernels

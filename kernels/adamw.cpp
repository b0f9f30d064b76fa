#include "kernels/adamw.h"

namespace krait::kernels {

void adamw_(const FlatUpdate& u, const Tensor& exp_avg, const Tensor& exp_avg_sq, const OptimizerSegments& segments,
            const AdamWOptions& o) {
  KRAIT_CHECK(o.beta1 >= 0 && o.beta1 < 1 && o.beta2 >= 0 && o.beta2 < 1 && o.eps > 0,
              "adamw: betas {}, {} must be in [0, 1) and eps {} positive", o.beta1, o.beta2, o.eps);
  check_flat_update("adamw", u, {exp_avg, exp_avg_sq}, segments);
  KRAIT_DISPATCH(u.param.device(), adamw_(u, exp_avg, exp_avg_sq, segments, o));
}

}  // namespace krait::kernels

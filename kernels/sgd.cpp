#include "kernels/sgd.h"

namespace krait::kernels {

void sgd_(const FlatUpdate& u, const Tensor& velocity, const OptimizerSegments& segments, const SgdOptions& o) {
  KRAIT_CHECK(o.momentum >= 0 && o.momentum < 1, "sgd: momentum {} must be in [0, 1)", o.momentum);
  KRAIT_CHECK(velocity.defined() == (o.momentum > 0), "sgd: momentum {} {} a velocity buffer", o.momentum,
              o.momentum > 0 ? "needs" : "does not use");
  KRAIT_CHECK(!o.nesterov || o.momentum > 0, "sgd: nesterov needs momentum > 0");
  check_flat_update("sgd", u, velocity.defined() ? std::vector<Tensor>{velocity} : std::vector<Tensor>{}, segments);
  KRAIT_DISPATCH(u.param.device(), sgd_(u, velocity, segments, o));
}

}  // namespace krait::kernels

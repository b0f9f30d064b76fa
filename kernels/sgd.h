#pragma once
#include "kernels/flat_update.h"

namespace krait {
namespace kernels {

struct SgdOptions {
  double momentum = 0;
  bool nesterov = false;
};

/// Stochastic gradient descent; momentum as in Sutskever et al. 2013 without dampening, decay decoupled:
///   m = momentum m + g          d = nesterov ? g + momentum m : m          p = p - lr (d + weight_decay p)
template <class T, bool kMomentum>
struct SgdRule {
  using Options = SgdOptions;
  static constexpr int kStates = kMomentum ? 1 : 0;
  T momentum, ahead, now, lr, decay;  // d = now g + ahead m

  KRAIT_HOST_DEVICE SgdRule(const Options& o, const double* hyper, double lr_scale, double weight_decay)
      : momentum(static_cast<T>(o.momentum)), ahead(o.nesterov ? static_cast<T>(o.momentum) : T{1}),
        now(o.nesterov ? T{1} : T{0}), lr(static_cast<T>(hyper[0] * lr_scale)), decay(static_cast<T>(weight_decay)) {}

  KRAIT_HOST_DEVICE void operator()(T& p, T g, T& m, T&) const {
    T d = g;
    if constexpr (kMomentum) {
      m = momentum * m + g;
      d = now * g + ahead * m;
    }
    p -= lr * (d + decay * p);
  }
};

/// velocity is undefined exactly when momentum is 0.
void sgd_(const FlatUpdate& u, const Tensor& velocity, const OptimizerSegments& segments, const SgdOptions& options);

KRAIT_BACKENDS(void sgd_(const FlatUpdate& u, const Tensor& velocity, const OptimizerSegments& segments,
                         const SgdOptions& options))

}  // namespace kernels
}  // namespace krait

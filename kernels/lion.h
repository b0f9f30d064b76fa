#pragma once
#include "kernels/flat_update.h"

namespace krait {
namespace kernels {

struct LionOptions {
  double beta1 = 0.9, beta2 = 0.99;
};

/// Lion (Chen et al. 2023, algorithm 2); sign(0) = 0:
///   u = sign(beta1 m + (1 - beta1) g)        p = p - lr (u + weight_decay p)
///   m = beta2 m + (1 - beta2) g
template <class T>
struct LionRule {
  using Options = LionOptions;
  static constexpr int kStates = 1;
  T beta1, beta2, rest1, rest2, lr, decay;

  KRAIT_HOST_DEVICE LionRule(const Options& o, const double* hyper, double lr_scale, double weight_decay)
      : beta1(static_cast<T>(o.beta1)), beta2(static_cast<T>(o.beta2)), rest1(static_cast<T>(1 - o.beta1)),
        rest2(static_cast<T>(1 - o.beta2)), lr(static_cast<T>(hyper[0] * lr_scale)),
        decay(static_cast<T>(weight_decay)) {}

  KRAIT_HOST_DEVICE void operator()(T& p, T g, T& m, T&) const {
    const T c = beta1 * m + rest1 * g;
    const T sign = c > 0 ? T{1} : c < 0 ? T{-1} : T{0};
    m = beta2 * m + rest2 * g;
    p -= lr * (sign + decay * p);
  }
};

void lion_(const FlatUpdate& u, const Tensor& exp_avg, const OptimizerSegments& segments, const LionOptions& options);

KRAIT_BACKENDS(void lion_(const FlatUpdate& u, const Tensor& exp_avg, const OptimizerSegments& segments,
                          const LionOptions& options))

}  // namespace kernels
}  // namespace krait

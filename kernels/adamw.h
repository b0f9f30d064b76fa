#pragma once
#include <cmath>

#include "kernels/flat_update.h"

namespace krait {
namespace kernels {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
};

/// AdamW (Loshchilov & Hutter 2019, algorithm 2), step t = 1, 2, ...; g is the clipped gradient:
///   m = beta1 m + (1 - beta1) g              v = beta2 v + (1 - beta2) g^2
///   p = p - lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p)
/// A Rule is one element's update, the same for both backends; m and v have the parameters' type.
template <class T>
struct AdamWRule {
  using Options = AdamWOptions;
  static constexpr int kStates = 2;
  T beta1, beta2, rest1, rest2, eps, lr, unbias1, unbias2, decay;

  KRAIT_HOST_DEVICE AdamWRule(const Options& o, const double* hyper, double lr_scale, double weight_decay)
      : beta1(static_cast<T>(o.beta1)), beta2(static_cast<T>(o.beta2)), rest1(static_cast<T>(1 - o.beta1)),
        rest2(static_cast<T>(1 - o.beta2)), eps(static_cast<T>(o.eps)), lr(static_cast<T>(hyper[0] * lr_scale)),
        unbias1(static_cast<T>(hyper[1])), unbias2(static_cast<T>(hyper[2])), decay(static_cast<T>(weight_decay)) {}

  KRAIT_HOST_DEVICE void operator()(T& p, T g, T& m, T& v) const {
    m = beta1 * m + rest1 * g;
    v = beta2 * v + rest2 * g * g;
    p -= lr * (m * unbias1 / (std::sqrt(v * unbias2) + eps) + decay * p);
  }
};

/// In place on u.param, the moments and what else FlatUpdate names.
void adamw_(const FlatUpdate& u, const Tensor& exp_avg, const Tensor& exp_avg_sq, const OptimizerSegments& segments,
            const AdamWOptions& options);

KRAIT_BACKENDS(void adamw_(const FlatUpdate& u, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                           const OptimizerSegments& segments, const AdamWOptions& options))

}  // namespace kernels
}  // namespace krait

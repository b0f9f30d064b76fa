#pragma once
#include "core/random.h"

namespace krait::layers {

/// What normal() and uniform() (layers/module.h) hold. Unlike others it draws into any dtype, with the values of the
/// fp64 draw rounded, so that large parameters need no fp64 copy.
struct RandomValues {
  void (*fill)(Tensor& value, double a, double b, uint64_t key);
  double a, b;
  void operator()(Tensor& value, uint64_t key) const { fill(value, a, b, key); }
};

}  // namespace krait::layers

#pragma once
#include "core/dtype.h"
#include "core/error.h"

namespace krait::kernels {

/// Calls f.template operator()<T>() with float or double, for what is computed in no less.
template <class F>
void visit_wide(DType dtype, F&& f) {
  KRAIT_ASSERT(dtype == DType::f32 || dtype == DType::f64, "expected float32 or float64, found {}", dtype);
  if (dtype == DType::f32)
    f.template operator()<float>();
  else
    f.template operator()<double>();
}

}  // namespace krait::kernels

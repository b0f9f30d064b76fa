#pragma once
#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

/// The learned functions on the edges of a KAN layer; see kernels/kan.h. base and scaler may be undefined.
struct KanVariables {
  Variable base, spline, scaler;  // (o, i), (o, i, G + k), (o, i)
  Tensor grid;                    // (i, G + 2k + 1)
  int64_t order = 3;
};

/// y_o = sum_i phi_oi(x_i): x (..., i) to (..., o).
Variable kan(const Variable& x, const KanVariables& p);
/// |phi_oi|, the mean over all rows of x: (o, i) in fp32 (fp64 for fp64).
Variable kan_edges(const Variable& x, const KanVariables& p);

}  // namespace autograd
}  // namespace krait

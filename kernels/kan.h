#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// Kolmogorov-Arnold layer (Liu et al. 2024, "KAN: Kolmogorov-Arnold networks", eq. 2.5 and 2.10): every edge from
/// input i to output o carries a learned function
///   phi_oi(x) = base_oi silu(x) + scaler_oi sum_g spline_oig B_g(x)          y_o = sum_i phi_oi(x_i)
/// of B-splines B_g of degree `order` = k over the knots t of the input (half-open intervals, 0/0 = 0; de Boor 1978):
///   B_{j,0}(x) = [t_j <= x < t_{j+1}]
///   B_{j,p}(x) = (x - t_j) / (t_{j+p} - t_j) B_{j,p-1} + (t_{j+p+1} - x) / (t_{j+p+1} - t_{j+1}) B_{j+1,p-1}
///   B'_{j,k}   = k (B_{j,k-1} / (t_{j+k} - t_j) - B_{j+1,k-1} / (t_{j+k+1} - t_{j+1}))
/// Outside [t_0, t_{G+2k}) all bases are 0; at most k+1 are not, so an edge costs 2(k+1) FLOPs whatever the grid.
struct KanParameters {
  Tensor base;    // (o, i); undefined: no base branch
  Tensor spline;  // (o, i, G + k)
  Tensor scaler;  // (o, i); undefined: 1
  Tensor grid;    // (i, G + 2k + 1) knots, ascending in each row; no gradient
  int64_t order = 3;
};
inline constexpr int64_t kMaxSplineOrder = 15;

/// x (..., i): fp32, fp64 or bf16, and base, spline, scaler in its dtype; grid in any floating dtype (kept in that of
/// sums: fp32, or fp64 with fp64). y (..., o) like x. Sums and bases in fp32 (fp64 for fp64).
Tensor kan_forward(const Tensor& x, const KanParameters& p);

/// With S_oi = sum_g spline_oig B_g(x_i), sums over all rows:
///   dspline_oig = scaler_oi sum dy_o B_g(x_i)      dscaler_oi = sum dy_o S_oi      dbase_oi = sum dy_o silu(x_i)
///   dx_i = sum_o dy_o phi'_oi(x_i)
/// dx like x, the others in the dtype of sums. Bases are computed again, nothing is saved. Fixed order of sums.
struct KanGrad { Tensor dx, base, spline, scaler; };
struct KanWants { bool dx = true, weights = true; };
KanGrad kan_backward(const Tensor& dy, const Tensor& x, const KanParameters& p, KanWants wants = {});

/// L1 norm of every edge over the rows: edges_oi = mean |phi_oi(x_i)|, (o, i) in the dtype of sums; 0 without rows.
/// The derivative of |phi| at 0 is 0.
Tensor kan_edges_forward(const Tensor& x, const KanParameters& p);
KanGrad kan_edges_backward(const Tensor& dedges, const Tensor& x, const KanParameters& p, KanWants wants = {});

/// All bases, or their derivatives, dense: x (..., i) to (..., i, G + k) in the dtype of sums.
Tensor bspline_basis(const Tensor& x, const Tensor& grid, int64_t order, bool derivative = false);

// Backends: x (r, i), everything contiguous, grid in the dtype of sums, r, i, o > 0. Of the gradients those that are
// defined are computed.
KRAIT_BACKENDS(void kan_forward(Tensor& y, const Tensor& x, const KanParameters& p);
               void kan_backward(KanGrad& grad, const Tensor& dy, const Tensor& x, const KanParameters& p);
               void kan_edges_forward(Tensor& edges, const Tensor& x, const KanParameters& p);
               void kan_edges_backward(KanGrad& grad, const Tensor& dedges, const Tensor& x, const KanParameters& p);
               void bspline_basis(Tensor& basis, const Tensor& x, const Tensor& grid, int64_t order, bool derivative))

}  // namespace kernels
}  // namespace krait

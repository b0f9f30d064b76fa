#include "kernels/layer_norm.h"

#include "kernels/cpu/norm.h"

namespace krait::kernels::cpu {

void layer_norm_forward(Tensor& y, Tensor& sum, Tensor& mean, Tensor& rstd, const Tensor& x, const Tensor& residual,
                        const Tensor& w, const Tensor& b, double eps, double weight_offset) {
  norm_forward<true>(y, sum, mean, rstd, x, residual, w, b, eps, weight_offset);
}

void layer_norm_backward(Tensor& dresidual, Tensor& dx, Tensor& dw, bool add_dw, Tensor& db, bool add_db,
                         const Tensor& dy, const Tensor& dr, const Tensor& x, const Tensor& w, const Tensor& mean,
                         const Tensor& rstd, double weight_offset) {
  norm_backward<true>(dresidual, dx, dw, add_dw, db, add_db, dy, dr, x, w, mean, rstd, weight_offset);
}

}  // namespace krait::kernels::cpu

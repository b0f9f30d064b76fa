#include "kernels/layer_norm.h"

#include "kernels/cuda/few_queue.h"
#include "kernels/cuda/norm_backward.cuh"
#include "kernels/cuda/step_known.h"

namespace krait::kernels::cuda {

void layer_norm_forward(Tensor& y, Tensor& sum, Tensor& mean, Tensor& rstd, const Tensor& x, const Tensor& residual,
                        const Tensor& w, const Tensor& b, double eps, double weight_offset) {
  if (gather_few_norm(true, y, sum, mean, rstd, x, residual, w, b, eps, weight_offset)) return;
  norm_forward<true>(y, sum, mean, rstd, x, residual, w, b, eps, weight_offset);
  few_launched(y);
  gather_rows_known(y);
}

void layer_norm_backward(Tensor& dresidual, Tensor& dx, Tensor& dw, bool add_dw, Tensor& db, bool add_db,
                         const Tensor& dy, const Tensor& dr, const Tensor& x, const Tensor& w, const Tensor& mean,
                         const Tensor& rstd, double weight_offset) {
  norm_backward<true>(dresidual, dx, dw, add_dw, db, add_db, dy, dr, x, w, mean, rstd, weight_offset);
}

}  // namespace krait::kernels::cuda

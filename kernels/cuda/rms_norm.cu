#include "kernels/rms_norm.h"

#include "kernels/cuda/few_queue.h"
#include "kernels/cuda/norm_backward.cuh"
#include "kernels/cuda/rows_queue.h"

namespace krait::kernels::cuda {

void rms_norm_forward(Tensor& y, Tensor& sum, Tensor& rstd, const Tensor& x, const Tensor& residual, const Tensor& w,
                      double eps) {
  Tensor no_mean;
  if (gather_few_norm(false, y, sum, no_mean, rstd, x, residual, w, Tensor(), eps, 0)) return;
  if (gather_rows_norm(y, sum, rstd, x, residual, w, eps)) return;
  norm_forward<false>(y, sum, no_mean, rstd, x, residual, w, Tensor(), eps);
}

void rms_norm_backward(Tensor& dresidual, Tensor& dx, Tensor& dw, bool add_dw, const Tensor& dy, const Tensor& dr,
                       const Tensor& x, const Tensor& w, const Tensor& rstd) {
  Tensor no_db;
  norm_backward<false>(dresidual, dx, dw, add_dw, no_db, false, dy, dr, x, w, Tensor(), rstd);
}

}  // namespace krait::kernels::cuda

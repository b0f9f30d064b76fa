#pragma once
#include "core/dtype.h"
#include "core/stream.h"
#include "kernels/mamba_step.h"

namespace krait::kernels::cuda {

/// What of Mamba's step follows its convolution (kernels/mamba_step.h) for rows of 16 states a channel: x_proj's product
/// comes as `projections` parts a row, projected (rows, projections, r + 32). r is a multiple of 4, at most 64.
struct RowsScan {
  bf16* y;
  float* h;
  const bf16 *mixed, *xz, *dt_proj;
  const float *projected, *dt_bias, *A_log, *D;
  int rows, e, r, projections;
};

inline constexpr int kScanStates = 16, kScanMaxRank = 64;

RowsScan rows_scan_of(Tensor& y, Tensor& h, const Tensor& mixed, const Tensor& xz, const Tensor& projected, const MambaStepWeights& w);

/// h and the weights are read before the kernel in front has finished.
void rows_scan(const RowsScan& a, Stream stream);

}  // namespace krait::kernels::cuda

#pragma once
#include "core/dtype.h"
#include "core/stream.h"
#include "kernels/mamba2_step.h"

namespace krait::kernels::cuda {

/// What of Mamba-2's step follows its convolution (kernels/mamba2_step.h) for heads of up to 64 channels and 128 states,
/// one group: weighted (rows, e) = u silu(z) norm, squares (rows, heads) of u silu(z) (RowScale).
struct RowsState {
  bf16* weighted;
  float* squares;
  void* h;
  bool narrow;  // h is bf16
  const bf16 *mixed, *zxbcdt;
  const float *dt_bias, *A_log, *D, *norm;
  float low, high;
  int rows, heads, p, channels, input, D_columns;
  bf16 *recent_x, *recent_B;  // null, and size 1: every position goes into h at once
  float* recent_steps;
  int32_t* count;
  int size;
};

inline constexpr int kHeadChannels = 64, kHeadStates = 128, kMaxRecent = 16;

/// Whether such steps are served; what w, h and `recent` (may be null) say of one, with squares or without.
bool rows_state_fits(const Tensor& h, const Tensor& zxbcdt, const Mamba2StepWeights& w);
RowsState rows_state_of(const Tensor& weighted, const Tensor& squares, Tensor& h, RecentPositions* recent, const Tensor& mixed, const Tensor& zxbcdt,
                        const Mamba2StepWeights& w);

/// h and what is recent are read before the kernel in front has finished.
void rows_state(const RowsState& a, Stream stream);

}  // namespace krait::kernels::cuda

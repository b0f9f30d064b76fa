#pragma once
#include "kernels/mamba2_step.h"
#include "kernels/mamba_step.h"

// mamba_step and mamba2_step for many rows in bf16: the convolution by itself, once a channel, then kernels that read each
// state once. False, with nothing queued, where they do not serve.
namespace krait::kernels::cuda {

bool mamba_step_rows(Tensor& y, Tensor& conv, Tensor& h, const Tensor& xz, const MambaStepWeights& w);
bool mamba2_step_rows(Tensor& y, Tensor& conv, Tensor& h, RecentPositions* recent, const Tensor& zxbcdt, const Mamba2StepWeights& w);

}  // namespace krait::kernels::cuda

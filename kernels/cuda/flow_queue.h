#pragma once
#include "kernels/attention_append.h"
#include "kernels/linear.h"
#include "kernels/mamba2_step.h"
#include "kernels/mamba_step.h"
#include "kernels/step_scope.h"

// A second persistent kernel for decoding steps, whose blocks wait for values and not for each other: chosen by the
// environment variable KRAIT_STEP_FLOW. Functions as in step_queue.h; false where it is not chosen or does not serve.
namespace krait::kernels::cuda::flow {

void gather_steps(std::unique_ptr<GatheredSteps>& steps, Device device);
/// mean and b are undefined in RMSNorm; residual and sum where nothing is added.
bool gather_norm(bool centred, Tensor& y, Tensor& sum, Tensor& mean, Tensor& rstd, const Tensor& x, const Tensor& residual,
                 const Tensor& w, const Tensor& b, double eps);
bool gather_linear(Tensor& y, const Gemm& g, const Tensor& bias, Epilogue epilogue);
bool gather_mamba_step(Tensor& y, Tensor& conv, Tensor& h, const Tensor& xz, const MambaStepWeights& w);
bool gather_mamba2_step(Tensor& y, Tensor& conv, Tensor& h, const Tensor& zxbcdt, const Mamba2StepWeights& w);
bool gather_attention_append(Tensor& o, const Tensor& qkv, Tensor& k_cache, Tensor& v_cache, const Tensor& position,
                             const AttentionAppend& a);

}  // namespace krait::kernels::cuda::flow

#pragma once
#include "kernels/attention_append.h"
#include "kernels/linear.h"
#include "kernels/mamba2_step.h"
#include "kernels/mamba_step.h"
#include "kernels/step_scope.h"

// A decoding step of more rows than few_queue.h serves, or of Mamba and Mamba-2: an operation waits for the next one, and
// the two run as one kernel where there is such: the embedding and RMSNorm, RMSNorm and the linear map behind it, a linear
// map and the sum with the residual stream, the maps of gated units and their product, Mamba's in_proj, convolution and
// x_proj; of 33 to 64 rows all layers of Mamba or of Mamba-2 that follow one another (rows_mamba.h, rows_mamba2.h); of up to
// 64 rows the head and the first largest of its logits (rows_head.h). Kernels begin while the one in front still runs
// (overlap.cuh).
namespace krait::kernels::cuda {

/// `few`: layers run as kernels of few rows where they can (few_steps.h).
std::unique_ptr<Deferred> gather_rows(Device device, bool few);

/// Each is true when it took the operation, with outputs allocated by the caller; false without such a scope, or where it
/// does not serve.
bool gather_rows_embedding(Tensor& y, const Tensor& table, const Tensor& tokens, const Tensor& places, const Tensor& positions);
bool gather_rows_norm(Tensor& y, Tensor& sum, Tensor& rstd, const Tensor& x, const Tensor& residual, const Tensor& w, double eps);
bool gather_rows_linear(Tensor& y, const Gemm& g, const Tensor& bias, Epilogue epilogue);
bool gather_rows_gated_units(Tensor& h, Tensor& pre, const Gemm& g);
/// In bf16, heads of 64 or 128, without ALiBi.
bool gather_rows_attention(Tensor& o, const Tensor& qkv, Tensor& k_cache, Tensor& v_cache, const Tensor& position, const AttentionAppend& a);
bool gather_rows_mamba_step(Tensor& y, Tensor& conv, Tensor& h, const Tensor& xz, const MambaStepWeights& w);
bool gather_rows_mamba2_step(Tensor& y, Tensor& conv, Tensor& h, RecentPositions* recent, const Tensor& zxbcdt, const Mamba2StepWeights& w);
/// sample_next (kernels/sample.h) of temperature 0, behind the map that makes the logits.
bool gather_rows_draw(Tensor& made, Tensor& last, Tensor& position, Tensor& step, const Tensor& logits);
/// Launches what waits, in front of kernels that bring a large state early: they are to find room beside it. Whether that was a
/// map whose values begin where those of `made` do.
bool gather_rows_launch_beside(const Tensor& made);

}  // namespace krait::kernels::cuda

#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// Results of norm_clip, on the device: a step never waits for them.
struct GradNorm {
  Tensor values;  // fp64 (4): norm, clip_scale, finite (1 or 0), norm^2
  Tensor norm() const { return values.select(0, 0); }
  Tensor clip_scale() const { return values.select(0, 1); }
  Tensor finite() const { return values.select(0, 2); }
  Tensor sum_squares() const { return values.slice(0, 3, 4); }  // (1), to be reduced over ranks
};

inline constexpr int64_t kNormChunk = 16384;

/// Sums of squares of fixed chunks of kNormChunk elements: fp64 (ceil(n / kNormChunk)), summed in fp64, the same
/// for every number of threads. x: any shape, contiguous, fp32, fp64 or bf16.
Tensor sum_squares(const Tensor& x);

/// sums: fp64 (k), added up in a fixed order.
///   norm = sqrt(sum)          clip_scale = min(1, max_norm / (norm + 1e-6)), or 1 when max_norm <= 0
/// When the sum is not finite, clip_scale and `finite` are 0 and skipped (int64 (1), optional) counts one more.
GradNorm norm_clip(const Tensor& sums, double max_norm, const Tensor& skipped = {});

/// Global L2 norm of a flat buffer. Over several buffers or ranks: norm_clip(grad.sum_squares() reduced).
inline GradNorm grad_norm(const Tensor& x, double max_norm, const Tensor& skipped = {}) {
  return norm_clip(sum_squares(x), max_norm, skipped);
}

KRAIT_BACKENDS(void sum_squares(Tensor& sums, const Tensor& x);
               void norm_clip(Tensor& values, const Tensor& sums, double max_norm, const Tensor& skipped))

}  // namespace kernels
}  // namespace krait

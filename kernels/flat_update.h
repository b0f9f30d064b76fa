#pragma once
#include <vector>

#include "core/dispatch.h"
#include "core/tensor.h"

namespace krait {
namespace kernels {

/// A run of the flat buffers with its own settings: lr_scale multiplies the learning rate, weight_decay is
/// decoupled (multiplied by the scaled learning rate).
struct SegmentSpec {
  int64_t offset = 0, length = 0;  // elements; offset a multiple of kSegmentAlignment
  double lr_scale = 1, weight_decay = 0;
};
inline constexpr int64_t kSegmentAlignment = 64;

/// The segments as an update reads them: a list of chunks, none longer than kUpdateChunk, none in two segments.
/// Neighbours with equal settings are one segment.
struct OptimizerSegments {
  int64_t numel = 0;  // of the flat buffers
  Tensor chunks;      // int64 (c, 3): begin, end, segment
  Tensor settings;    // fp64 (s, 2): lr_scale, weight_decay
};
inline constexpr int64_t kUpdateChunk = 4096;

/// specs: ascending, not overlapping, the first at 0. Elements between two specs are padding: they are updated
/// with the settings of the spec before them, and stay zero where parameter, gradient and state are zero.
OptimizerSegments make_optimizer_segments(const std::vector<SegmentSpec>& specs, int64_t numel, Device device);

/// What one optimizer step reads and writes, in one launch over its parameters. All flat, contiguous, aligned to
/// 16 bytes, on one device, of n elements unless said otherwise.
struct FlatUpdate {
  Tensor param;    // fp32 or fp64: the master weights
  Tensor grad;     // like param; bf16 is allowed beside fp32
  Tensor compute;  // bf16 or undefined: receives the rounded new parameters
  Tensor hyper;    // fp64 (3): learning rate, 1 / (1 - beta1^t), 1 / (1 - beta2^t). Refreshed before every step
  Tensor clip;     // fp64 (4) or undefined: GradNorm::values. Gradients are multiplied by its clip_scale; when
                   // its `finite` is 0 nothing changes except that the gradients are zeroed
  bool zero_grad = false;
};

/// Throws Error unless buffers, states and segments fit together.
void check_flat_update(std::string_view op, const FlatUpdate& u, const std::vector<Tensor>& states,
                       const OptimizerSegments& segments);

/// Calls f.template operator()<P, G>() with the types of parameters and gradients.
template <class F>
void visit_update(const FlatUpdate& u, F&& f) {
  if (u.param.dtype() == DType::f64)
    f.template operator()<double, double>();
  else if (u.grad.dtype() == DType::bf16)
    f.template operator()<float, bf16>();
  else
    f.template operator()<float, float>();
}

}  // namespace kernels
}  // namespace krait

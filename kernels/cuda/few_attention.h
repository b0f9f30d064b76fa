#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/stream.h"
#include "kernels/attention_append.h"
#include "kernels/step_scope.h"

namespace krait::kernels::cuda {

inline constexpr int kFewestSplits = 2, kFewSplits = 8;
inline constexpr int kFewShare = 160 * 64;  // values of a head's keys that a block reads at most, while splits suffice

/// attention_append (kernels/attention_append.h) in bf16 with heads of 64 or 128. A head's positions are shared by blocks of
/// a cluster, `splits` when the cache is full. Outputs do not depend on the capacity.
struct StepAttention {
  bf16 *o, *k_cache, *v_cache;
  const bf16* qkv;
  const int32_t* position;
  const float *cos, *sin;  // null: no rotation
  int64_t qkv_row;
  int capacity, rows, hq, hkv, d, half;  // half: pairs that turn
  bool interleaved;
  float scale;
  bool ahead;  // position and what the caches hold were written before the kernels that can be under way
  bool early;  // the next kernel may begin before those in front of this one have finished
  int splits;
};

/// All but ahead, early and splits.
StepAttention step_attention_of(Tensor& o, const Tensor& qkv, Tensor& k_cache, Tensor& v_cache, const Tensor& position, const AttentionAppend& a);
/// Whether sizes and addresses suit both kernels.
bool step_attention_fits(const StepAttention& a);

/// Of 1 to kFewRows rows; splits from kFewestSplits to kFewSplits.
void few_attention(const StepAttention& a, Stream stream);

}  // namespace krait::kernels::cuda

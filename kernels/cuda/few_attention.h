#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "core/stream.h"
#include "kernels/step_scope.h"

namespace krait::kernels::cuda {

inline constexpr int kFewestSplits = 2, kFewSplits = 8;
inline constexpr int kFewShare = 160 * 64;  // values of a head's keys that a block reads at most, while splits suffice

/// attention_append (kernels/attention_append.h) of 1 to kFewRows rows, bf16, with heads of 64 or 128. A head's positions are
/// shared by blocks of a cluster, `splits` when the cache is full. Outputs do not depend on the capacity.
struct FewAttention {
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

bool few_attention_fits(const FewAttention& a);
void few_attention(const FewAttention& a, Stream stream);

}  // namespace krait::kernels::cuda

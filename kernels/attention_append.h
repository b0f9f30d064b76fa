#pragma once
#include "core/dispatch.h"
#include "core/tensor.h"
#include "kernels/rope.h"

namespace krait::kernels {

/// Self-attention of one new position against a cache, with the position on the device, so that a captured step
/// serves every position: rotates q and k (kernels/rope.h), puts k and v into the cache at `position`, and attends over
/// positions 0 .. position.
struct AttentionAppend {
  int64_t hq = 0, hkv = 0;
  double scale = 0;       // 0: d^(-1/2)
  Tensor cos = {}, sin = {};  // rotary tables of as many positions as the cache, or undefined
  RopeStyle style = RopeStyle::half;
  Tensor alibi_slopes = {};  // (hq) fp32 or undefined
};
/// Whether the kernel takes these sizes; elsewhere attention_step (kernels/attention.h) serves.
bool attention_append_serves(DType dtype, Device device, int64_t head_dim, int64_t capacity);

/// qkv (b, hq + 2 hkv, d): queries, keys, values, in fp32 or bf16, rows of b may be apart; caches (b, capacity, hkv, d)
/// alike, contiguous; position (b) int32. o (b, hq, d). Positions at or past the capacity give NaN and change nothing.
Tensor attention_append(const Tensor& qkv, Tensor& k_cache, Tensor& v_cache, const Tensor& position, const AttentionAppend& a);

KRAIT_BACKENDS(void attention_append(Tensor& o, const Tensor& qkv, Tensor& k_cache, Tensor& v_cache, const Tensor& position,
                                     const AttentionAppend& a))

}  // namespace krait::kernels

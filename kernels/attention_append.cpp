#include "kernels/attention_append.h"

#include <cmath>

namespace krait::kernels {

bool attention_append_serves(DType dtype, Device device, int64_t head_dim, int64_t capacity) {
  if (device.is_cpu()) return dtype != DType::f16;
  return (dtype == DType::f32 || dtype == DType::bf16) && head_dim % 8 == 0 && head_dim <= 256 && capacity <= 8192;
}

Tensor attention_append(const Tensor& qkv, Tensor& k_cache, Tensor& v_cache, const Tensor& position, const AttentionAppend& a) {
  check_same("attention_append", qkv, k_cache, v_cache);
  KRAIT_CHECK(qkv.ndim() == 3 && qkv.size(1) == a.hq + 2 * a.hkv && a.hkv > 0 && a.hq % a.hkv == 0,
              "attention_append: qkv is {}, expected (b, {} + 2 x {}, d)", qkv.shape(), a.hq, a.hkv);
  const int64_t b = qkv.size(0), d = qkv.size(2);
  KRAIT_CHECK(k_cache.ndim() == 4 && k_cache.size(0) == b && k_cache.size(2) == a.hkv && k_cache.size(3) == d &&
                  k_cache.shape() == v_cache.shape() && k_cache.is_contiguous() && v_cache.is_contiguous(),
              "attention_append: the caches are {} and {}, expected contiguous ({}, capacity, {}, {})", k_cache.shape(),
              v_cache.shape(), b, a.hkv, d);
  KRAIT_CHECK(position.dtype() == DType::i32 && position.shape() == Shape{b} && position.is_contiguous(),
              "attention_append: position is {}, expected int32 ({})", describe(position), b);
  KRAIT_CHECK(!a.cos.defined() || (a.cos.size(0) >= k_cache.size(1) && a.cos.is_contiguous() && a.sin.is_contiguous()),
              "attention_append: the rotary table has {} positions, the cache {}", a.cos.defined() ? a.cos.size(0) : 0, k_cache.size(1));
  KRAIT_CHECK(attention_append_serves(qkv.dtype(), qkv.device(), d, k_cache.size(1)), "attention_append: does not serve {} with a cache of {}",
              describe(qkv), k_cache.size(1));
  Tensor o = empty({b, a.hq, d}, qkv.dtype(), qkv.device());
  if (o.numel() == 0) return o;
  AttentionAppend whole = a;
  if (whole.scale == 0) whole.scale = 1 / std::sqrt(static_cast<double>(d));
  KRAIT_DISPATCH(qkv.device(), attention_append(o, qkv.stride(2) == 1 && qkv.stride(1) == d ? qkv : qkv.contiguous(), k_cache,
                                                v_cache, position, whole));
  return o;
}

}  // namespace krait::kernels

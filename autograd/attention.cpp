#include "autograd/attention.h"

namespace krait::autograd {

Variable attention(const Variable& q, const Variable& k, const Variable& v, const AttentionOptions& options) {
  auto [o, lse] = kernels::attention_forward(q.data(), k.data(), v.data(), options);
  return record("attention", {q, k, v}, o,
                [q = q.data(), k = k.data(), v = v.data(), o = o, lse = lse, options](const Tensor& dy) -> Grads {
                  auto [dq, dk, dv] = kernels::attention_backward(dy, q, k, v, o, lse, options);
                  return {dq, dk, dv};
                });
}

namespace {

// q, k, v as views of the fused tensor.
struct Split {
  Tensor q, k, v;
  Split(const Tensor& qkv, int64_t hq, int64_t hkv) {
    const int64_t b = qkv.size(0), l = qkv.size(1), heads = hq + 2 * hkv, d = qkv.size(2) / heads;
    const Tensor parts = qkv.view({b, l, heads, d});
    q = parts.slice(2, 0, hq);
    k = parts.slice(2, hq, hq + hkv);
    v = parts.slice(2, hq + hkv, heads);
  }
};

}  // namespace

Variable attention_qkv(const Variable& qkv, int64_t hq, int64_t hkv, const AttentionOptions& options) {
  KRAIT_CHECK(hq > 0 && hkv > 0 && qkv.ndim() == 3 && qkv.size(2) % (hq + 2 * hkv) == 0 && qkv.size(2) > 0,
              "attention_qkv: {} does not split into {} query and 2 x {} key and value heads", qkv.shape(), hq, hkv);
  const Tensor fused = qkv.data().contiguous();
  const Split in(fused, hq, hkv);
  auto [o, lse] = kernels::attention_forward(in.q, in.k, in.v, options);
  const Shape packed{qkv.size(0), qkv.size(1), o.size(2) * o.size(3)};
  return record("attention_qkv", {qkv}, o.view(packed),
                [fused, o = o, lse = lse, hq, hkv, options](const Tensor& dy) -> Grads {
                  const Split x(fused, hq, hkv);
                  Tensor dqkv = empty_like(fused);
                  Split d(dqkv, hq, hkv);
                  kernels::attention_backward_into(d.q, d.k, d.v, dy.reshape(o.shape()), x.q, x.k, x.v, o, lse,
                                                   options);
                  return {dqkv};
                });
}

}  // namespace krait::autograd

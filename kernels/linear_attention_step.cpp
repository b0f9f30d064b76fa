#include "kernels/linear_attention_step.h"

namespace krait::kernels {

Tensor linear_attention_step(Tensor& S, const Tensor& qkv, const LinearAttentionStep& step) {
  KRAIT_CHECK(qkv.ndim() == 4 && qkv.size(1) == 3 && qkv.is_contiguous(), "linear_attention_step: qkv is {}, expected contiguous (b, 3, heads, d)",
              describe(qkv));
  const int64_t b = qkv.size(0), h = qkv.size(2), d = qkv.size(3);
  const DType a = accum_dtype(qkv.dtype());
  const Shape state{b, h, step.elu1 ? d + 1 : d, d};
  KRAIT_CHECK(S.shape() == state && S.dtype() == a && S.device() == qkv.device() && S.is_contiguous(),
              "linear_attention_step: the state is {}, expected contiguous {} {}", describe(S), name_of(a), state);
  LinearAttentionStep whole = step;
  if (step.gate_weight.defined()) {
    check_same("linear_attention_step", qkv, step.u, step.gate_weight);
    KRAIT_CHECK(step.u.ndim() == 2 && step.u.size(0) == b && step.gate_weight.shape() == (Shape{h, step.u.size(1)}) &&
                    step.gate_bias.shape() == Shape{h} && step.gate_bias.dtype() == a && step.gate_bias.device() == qkv.device(),
                "linear_attention_step: u is {}, the gate's weight {}, its bias {}", step.u.shape(), step.gate_weight.shape(), describe(step.gate_bias));
    for (Tensor* t : {&whole.u, &whole.gate_weight, &whole.gate_bias}) *t = t->contiguous();
  }
  Tensor y = empty({b, h, d}, qkv.dtype(), qkv.device());
  bool done = y.numel() == 0;
  if (!done) KRAIT_DISPATCH_GPU(qkv.device(), linear_attention_step(done, y, S, qkv, whole));
  return done ? y : Tensor();
}

}  // namespace krait::kernels

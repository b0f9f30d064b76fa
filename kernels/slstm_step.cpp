#include "kernels/slstm_step.h"

#include <array>

#include "kernels/causal_conv1d.h"
#include "kernels/elementwise.h"
#include "kernels/head_norm.h"
#include "kernels/matmul.h"

namespace krait::kernels {

namespace {

Tensor composed(Tensor& conv, Tensor& cell, const Tensor& x, const SlstmStepWeights& w) {
  const int64_t b = x.size(0), h = w.R.size(0), p = w.R.size(2);
  const Tensor u = conv.defined() ? causal_conv1d_step(conv, x, w.conv_weight, w.conv_bias, true) : x;
  const auto by_head = [&](const Tensor& t) { return t.view({b, h, p}).transpose(0, 1); };
  Tensor wx = empty({b, 1, 4, h, p}, x.dtype(), x.device());
  const std::array<const Tensor*, 4> maps{&w.w_i, &w.w_f, &w.w_z, &w.w_o};
  for (size_t g = 0; g < 4; ++g) {
    Tensor gate = wx.select(1, 0).select(1, static_cast<int64_t>(g)).transpose(0, 1);  // (h, b, p)
    matmul_out(gate, by_head(g < 2 ? u : x), *maps[g], false, true);
  }
  const RecurrenceOut out = slstm_forward(wx, w.R, w.bias, cell.transpose(0, 1).contiguous(), {}, w.forget, false);
  copy_(cell, out.state.transpose(0, 1));
  return head_norm_forward(out.y, add_scalar(w.norm, 1.0), w.norm_eps).y.view(x.shape());
}

}  // namespace

Tensor slstm_step(Tensor& conv, Tensor& cell, const Tensor& x_in, const SlstmStepWeights& w) {
  KRAIT_CHECK(x_in.ndim() == 2 && w.R.ndim() == 4, "slstm_step: the input is {}, R {}", x_in.shape(), w.R.shape());
  const int64_t b = x_in.size(0), h = w.R.size(0), p = w.R.size(2);
  const DType a = accum_dtype(x_in.dtype());
  check_same("slstm_step", x_in, w.w_i, w.w_f);
  check_same("slstm_step", x_in, w.w_z, w.w_o, w.R);
  KRAIT_CHECK(x_in.size(1) == h * p && w.R.shape() == (Shape{h, 4, p, p}), "slstm_step: the input is {}, R {}", x_in.shape(), w.R.shape());
  for (const Tensor* t : {&w.w_i, &w.w_f, &w.w_z, &w.w_o})
    KRAIT_CHECK(t->shape() == (Shape{h, p, p}), "slstm_step: a weight is {}, expected {}", t->shape(), Shape{h, p, p});
  KRAIT_CHECK(cell.shape() == (Shape{b, 4, h, p}) && cell.dtype() == a && cell.device() == x_in.device() && cell.is_contiguous(),
              "slstm_step: the state is {}, expected {} {}", describe(cell), name_of(a), Shape{b, 4, h, p});
  KRAIT_CHECK(w.bias.shape() == (Shape{4, h, p}) && w.norm.shape() == Shape{h * p} && w.bias.dtype() == a && w.norm.dtype() == a,
              "slstm_step: the bias is {}, the norm's weight {}", describe(w.bias), describe(w.norm));
  KRAIT_CHECK(conv.defined() == w.conv_weight.defined(), "slstm_step: filters without their state, or a state without filters");
  SlstmStepWeights whole = w;
  if (conv.defined()) {
    check_same("slstm_step", x_in, conv, w.conv_weight);
    KRAIT_CHECK(w.conv_weight.ndim() == 2 && w.conv_weight.size(0) == h * p && conv.is_contiguous() &&
                    conv.shape() == (Shape{b, w.conv_weight.size(1) - 1, h * p}),
                "slstm_step: the convolution's state is {}, its filters {}", describe(conv), w.conv_weight.shape());
    whole.conv_weight = w.conv_weight.contiguous();
    if (w.conv_bias.defined()) whole.conv_bias = w.conv_bias.contiguous();
  }
  for (Tensor* t : {&whole.w_i, &whole.w_f, &whole.w_z, &whole.w_o, &whole.R, &whole.bias, &whole.norm}) *t = t->contiguous();
  const Tensor x = x_in.contiguous();
  Tensor y = empty(x.shape(), x.dtype(), x.device());
  bool done = y.numel() == 0;
  if (!done) KRAIT_DISPATCH_GPU(x.device(), slstm_step(done, y, conv, cell, x, whole));
  return done ? y : composed(conv, cell, x, whole);
}

}  // namespace krait::kernels

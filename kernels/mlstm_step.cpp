#include "kernels/mlstm_step.h"

#include <algorithm>
#include <utility>

#include "kernels/activation.h"
#include "kernels/block_linear.h"
#include "kernels/causal_conv1d.h"
#include "kernels/elementwise.h"
#include "kernels/head_norm.h"
#include "kernels/matmul.h"
#include "kernels/reduce.h"
#include "kernels/rows.h"

namespace krait::kernels {

namespace {

// x (b, blocks side) by a block-diagonal matrix.
Tensor by_blocks(const Tensor& x, const Tensor& w) {
  if (std::max(w.size(1), w.size(2)) <= kMaxBlockSide) return block_linear_forward(x, w);
  const Tensor blocks = x.contiguous().view({x.size(0), w.size(0), w.size(2)}).transpose(0, 1);
  return matmul(blocks, w, false, true).transpose(0, 1).contiguous().view({x.size(0), w.size(0) * w.size(1)});
}

MlstmStepMaps composed_maps(Tensor& conv, const Tensor& x_m, const MlstmStepMapsWeights& w) {
  const Tensor x_c = causal_conv1d_step(conv, x_m, w.conv_weight, w.conv_bias, true);
  if (mlstm_maps_serve(x_c, w.maps)) {
    const MlstmMaps out = mlstm_maps_forward(x_c, x_m, w.maps);
    return {out.q, out.k, out.v, x_c, out.gates.unsqueeze(1)};
  }
  const MlstmStepMaps out{by_blocks(x_c, w.maps.w_q), by_blocks(x_c, w.maps.w_k), by_blocks(x_m, w.maps.w_v), x_c,
                          empty({x_m.size(0), 1, w.maps.g.size(0)}, accum_dtype(x_m.dtype()), x_m.device())};
  Tensor gates = out.gates.select(1, 0);
  const int64_t e = x_m.size(1);
  for (const auto& [part, x] : {std::pair{int64_t{0}, out.q}, {int64_t{1}, out.k}, {int64_t{2}, out.v}})
    matmul_out(gates, x, w.maps.g.slice(1, part * e, (part + 1) * e), false, true, 1.0, part > 0 ? 1.0 : 0.0);
  return out;
}

Tensor composed_output(MlstmState& state, const MlstmStepMaps& in, const Tensor& z, const MlstmStepOutputWeights& w) {
  const int64_t b = state.c.size(0), heads = state.c.size(1), dq = state.c.size(2), dv = state.c.size(3);
  const Tensor gates = add(sum(in.gates, {1}), w.gate_bias), weight = add_scalar(w.norm, 1.0);
  const Tensor h = mlstm_step(in.q.view({b, heads, dq}), in.k.view({b, heads, dq}), in.v.view({b, heads, dv}),
                              gates.slice(1, 0, heads), gates.slice(1, heads, 2 * heads), state, w.eps);
  if (mlstm_output_serves(h)) return mlstm_output_forward(h, weight, w.skip, in.x_c, z, w.norm_eps).y;
  const Tensor normed = head_norm_forward(h, weight, w.norm_eps).y.to(z.dtype()).view(in.x_c.shape());
  return mul(activation_forward(z.contiguous(), Activation::silu), add(normed, mul(w.skip, in.x_c)));
}

}  // namespace

MlstmStepMaps mlstm_step_maps(Tensor& conv, const Tensor& x_in, const MlstmStepMapsWeights& w) {
  KRAIT_CHECK(x_in.ndim() == 2 && w.conv_weight.ndim() == 2 && w.maps.g.ndim() == 2 && w.maps.w_q.ndim() == 3,
              "mlstm_step: the input is {}, the filters {}, the gates {}", x_in.shape(), w.conv_weight.shape(), w.maps.g.shape());
  const int64_t b = x_in.size(0), e = x_in.size(1), side = w.maps.w_q.size(1);
  check_same("mlstm_step", x_in, conv, w.conv_weight);
  check_same("mlstm_step", x_in, w.maps.w_q, w.maps.w_k);
  check_same("mlstm_step", x_in, w.maps.w_v, w.maps.g);
  KRAIT_CHECK(conv.shape() == (Shape{b, w.conv_weight.size(1) - 1, e}) && w.conv_weight.size(0) == e && conv.is_contiguous(),
              "mlstm_step: the convolution's state is {}, its filters {}, the input {}", describe(conv), w.conv_weight.shape(), x_in.shape());
  for (const Tensor* t : {&w.maps.w_q, &w.maps.w_k, &w.maps.w_v})
    KRAIT_CHECK(t->shape() == (Shape{e / side, side, side}) && e % side == 0, "mlstm_step: a map is {}, the input {}", t->shape(), x_in.shape());
  KRAIT_CHECK(w.maps.g.size(1) == 3 * e, "mlstm_step: the gates' weight is {}, the input {}", w.maps.g.shape(), x_in.shape());
  const Tensor x_m = last_contiguous(x_in);
  const MlstmStepMapsWeights whole{w.conv_weight.contiguous(), w.conv_bias.defined() ? w.conv_bias.contiguous() : Tensor(),
                                   {w.maps.w_q.contiguous(), w.maps.w_k.contiguous(), w.maps.w_v.contiguous(), w.maps.g.contiguous()}};
  const auto like = [&] { return empty({b, e}, x_m.dtype(), x_m.device()); };
  MlstmStepMaps out{like(), like(), like(), like(), {}};
  bool done = false;
  if (b > 0) KRAIT_DISPATCH_GPU(x_m.device(), mlstm_step_maps(done, out, conv, x_m, whole));
  return done ? out : composed_maps(conv, x_m, whole);
}

namespace {

Tensor step_output(MlstmState& state, MlstmRecent* recent, const MlstmStepMaps& in, const Tensor& z_in, const MlstmStepOutputWeights& w) {
  KRAIT_CHECK(state.c.defined() && state.c.ndim() == 4, "mlstm_step: no state");
  const int64_t b = state.c.size(0), heads = state.c.size(1), e = heads * state.c.size(3);
  const DType a = accum_dtype(z_in.dtype());
  check_same("mlstm_step", z_in, in.q, in.k);
  check_same("mlstm_step", z_in, in.v, in.x_c, w.skip);
  KRAIT_CHECK(state.n.shape() == state.c.shape().drop_last() && state.m.shape() == (Shape{b, heads}), "mlstm_step: the state is {}, {}, {}",
              state.c.shape(), state.n.shape(), state.m.shape());
  for (const Tensor* t : {&state.c, &state.n, &state.m})
    KRAIT_CHECK((t->dtype() == a || (recent != nullptr && t == &state.c && t->dtype() == DType::bf16)) && t->is_contiguous() && t->device() == z_in.device(),
                "mlstm_step: a state is {}, the input {}",
                describe(*t), describe(z_in));
  KRAIT_CHECK(z_in.shape() == (Shape{b, e}) && in.x_c.shape() == z_in.shape() && in.v.shape() == z_in.shape() &&
                  in.q.shape() == (Shape{b, heads * state.c.size(2)}) && in.k.shape() == in.q.shape(),
              "mlstm_step: q {}, k {}, v {}, x_c {}, z {} do not fit a state {}", in.q.shape(), in.k.shape(), in.v.shape(),
              in.x_c.shape(), z_in.shape(), state.c.shape());
  KRAIT_CHECK(in.gates.ndim() == 3 && in.gates.size(0) == b && in.gates.size(2) == 2 * heads && in.gates.dtype() == a,
              "mlstm_step: gates are {}, expected {} ({}, parts, {})", describe(in.gates), name_of(a), b, 2 * heads);
  KRAIT_CHECK(w.gate_bias.shape() == Shape{2 * heads} && w.norm.shape() == Shape{e} && w.skip.shape() == Shape{e} && w.norm.dtype() == a &&
                  w.gate_bias.dtype() == a,
              "mlstm_step: the gates' bias is {}, the norm's weight {}, the skip's {}", describe(w.gate_bias), describe(w.norm), describe(w.skip));
  const Tensor z = last_contiguous(z_in);
  const MlstmStepMaps whole{in.q.contiguous(), in.k.contiguous(), in.v.contiguous(), in.x_c.contiguous(), in.gates.contiguous()};
  const MlstmStepOutputWeights weights{w.gate_bias.contiguous(), w.norm.contiguous(), w.skip.contiguous(), w.eps, w.norm_eps};
  Tensor y = empty({b, e}, z.dtype(), z.device());
  if (recent != nullptr) {
    KRAIT_CHECK(z.device().is_cuda(), "mlstm_step: a state behind its positions is a GPU's");
    if (y.numel() > 0) KRAIT_DISPATCH_GPU(z.device(), mlstm_step_output(y, state, *recent, whole, z, weights));
    return y;
  }
  bool done = y.numel() == 0;
  if (!done) KRAIT_DISPATCH_GPU(z.device(), mlstm_step_output(done, y, state, whole, z, weights));
  return done ? y : composed_output(state, whole, z, weights);
}

}  // namespace

Tensor mlstm_step_output(MlstmState& state, const MlstmStepMaps& in, const Tensor& z, const MlstmStepOutputWeights& w) {
  return step_output(state, nullptr, in, z, w);
}

Tensor mlstm_step_output(MlstmState& state, MlstmRecent& recent, const MlstmStepMaps& in, const Tensor& z, const MlstmStepOutputWeights& w) {
  return step_output(state, &recent, in, z, w);
}

MlstmRecent mlstm_recent(const MlstmState& state, const Tensor& conv, [[maybe_unused]] const MlstmStepMapsWeights& w) {
  constexpr int64_t kSize = 16;  // reading what is recent costs about what C's writes still do
  const Device device = conv.device();
  bool fits = false;
  KRAIT_DISPATCH_GPU(device, mlstm_recent_fits(fits, state, conv, w));
  if (!fits) return {};
  const int64_t b = state.c.size(0), heads = state.c.size(1);
  return {zeros({b, heads, kSize, state.c.size(2)}, conv.dtype(), device), zeros({b, heads, kSize, state.c.size(3)}, conv.dtype(), device),
          zeros({b, heads, kSize, 2}, DType::f32, device), zeros({b, heads}, DType::i32, device), zeros({b, heads}, DType::i32, device)};
}

}  // namespace krait::kernels

#include "autograd/mlstm_block.h"

#include <utility>

#include "autograd/activation.h"
#include "autograd/block_linear.h"
#include "autograd/causal_conv1d.h"
#include "autograd/elementwise.h"
#include "autograd/gate_linear.h"
#include "autograd/head_norm.h"
#include "autograd/shape.h"
#include "kernels/accumulate.h"
#include "kernels/causal_conv1d.h"
#include "kernels/mlstm_block.h"

namespace krait::autograd {

Tensor HalvesGradient::half(int64_t i) {
  if (!whole_.defined()) whole_ = empty(shape_, dtype_, device_);
  const int64_t e = shape_[-1] / 2;
  return whole_.slice(whole_.ndim() - 1, i * e, (i + 1) * e);
}

Tensor HalvesGradient::take(const Tensor& a, const Tensor& z) {
  const Tensor whole = std::exchange(whole_, {});
  const auto holds = [&](const Tensor& t, int64_t at) {
    return t.defined() && t.storage() == whole.storage() && t.raw_data() == static_cast<const char*>(whole.raw_data()) + at;
  };
  if (!whole.defined() || whole.numel() == 0) return {};
  return holds(a, 0) && holds(z, whole.size(-1) / 2 * size_of(dtype_)) ? whole : Tensor();
}

MlstmHalves mlstm_halves(const Variable& up) {
  KRAIT_CHECK(up.ndim() >= 1 && up.size(-1) % 2 == 0, "mlstm_halves: {} has no halves", up.shape());
  const int64_t e = up.size(-1) / 2, last = up.ndim() - 1;
  const Tensor x = up.data().slice(last, 0, e), z = up.data().slice(last, e, 2 * e);
  const auto gradient = std::make_shared<HalvesGradient>(up.data());
  const Vars y = record("mlstm_halves", {up}, {x, x, z},
                        [gradient, shape = x.shape(), dtype = up.dtype(), device = up.device()](const std::vector<Tensor>& d) -> Grads {
                          if (const Tensor whole = gradient->take(d[1], d[2]); whole.defined()) {
                            Tensor x_m = d[1];
                            if (d[0].defined()) kernels::accumulate(x_m, d[0]);
                            return {whole};
                          }
                          const auto or_zero = [&](const Tensor& t) { return t.defined() ? t : zeros(shape, dtype, device); };
                          return {kernels::mlstm_join(or_zero(d[0]), or_zero(d[1]), or_zero(d[2]))};
                        });
  return {y[0], y[1], y[2], gradient};
}

MlstmMapped mlstm_maps(const Variable& x_c, const Variable& x_m, const Variable& w_q, const Variable& w_k,
                       const Variable& w_v, const Variable& gates) {
  const kernels::MlstmMapsWeights w{w_q.data(), w_k.data(), w_v.data(), gates.data()};
  if (!kernels::mlstm_maps_serve(x_c.data(), w)) {
    const Variable q = block_linear(x_c, w_q), k = block_linear(x_c, w_k), v = block_linear(x_m, w_v);
    return {q, k, v, gate_linear({q, k, v}, gates), x_c};
  }
  const kernels::MlstmMaps out = kernels::mlstm_maps_forward(x_c.data(), x_m.data(), w);
  const Vars y = record("mlstm_maps", {x_c, x_m, w_q, w_k, w_v, gates}, {out.q, out.k, out.v, out.gates, x_c.data()},
                        [w_q, w_k, w_v, gates, w, c = x_c.data(), m = x_m.data()](const std::vector<Tensor>& d) -> Grads {
                          auto g = kernels::mlstm_maps_backward(
                              {d[0], d[1], d[2], d[3], d[4]}, c, m, w,
                              {w_q.grad_in_place(), w_k.grad_in_place(), w_v.grad_in_place(), gates.grad_in_place()});
                          return {g.dx_c, g.dx_m, g.dw.w_q, g.dw.w_k, g.dw.w_v, g.dw.g};
                        });
  return {y[0], y[1], y[2], y[3], y[4]};
}

MlstmConvolved mlstm_conv_maps(const MlstmHalves& up, const Variable& conv_weight, const Variable& conv_bias,
                               const Variable& initial_state, const Tensor& segments, const Variable& w_q,
                               const Variable& w_k, const Variable& w_v, const Variable& gates) {
  const kernels::MlstmMapsWeights w{w_q.data(), w_k.data(), w_v.data(), gates.data()};
  const Variable& x = up.x_m_again;
  if (!kernels::mlstm_maps_serve(x.data(), w)) {
    const ConvOut conv = causal_conv1d(x, conv_weight, conv_bias, initial_state, true, segments);
    return {mlstm_maps(conv.y, x, w_q, w_k, w_v, gates), conv.final_state};
  }
  kernels::CausalConv1dOut conv;
  kernels::MlstmMaps out;
  if (!initial_state.defined() && !segments.defined() && kernels::mlstm_conv_maps_serve(x.data(), conv_weight.data(), w)) {
    auto both = kernels::mlstm_conv_maps_forward(x.data(), conv_weight.data(), conv_bias.data(), w);
    conv = {both.x_c, x.data().slice(1, x.size(1) - conv_weight.size(1) + 1, x.size(1))};
    out = both.maps;
  } else {
    conv = kernels::causal_conv1d_forward(x.data(), conv_weight.data(), conv_bias.data(), initial_state.data(), true, segments);
    out = kernels::mlstm_maps_forward(conv.y, x.data(), w);
  }
  const Vars y = record(
      "mlstm_conv_maps", {x, conv_weight, conv_bias, initial_state, w_q, w_k, w_v, gates},
      {out.q, out.k, out.v, out.gates, conv.y, conv.final_state},
      [w_q, w_k, w_v, gates, conv_weight, conv_bias, segments, w, m = x.data(), c = conv.y, initial = initial_state.data(),
       gradient = up.gradient](const std::vector<Tensor>& d) -> Grads {
        const Tensor dx = gradient->half(0);
        kernels::CausalConv1dGrad of_conv;
        auto g = kernels::mlstm_maps_backward(
            {d[0], d[1], d[2], d[3], d[4]}, c, m, w,
            {w_q.grad_in_place(), w_k.grad_in_place(), w_v.grad_in_place(), gates.grad_in_place()}, dx,
            [&](const Tensor& dx_c) {
              of_conv = kernels::causal_conv1d_backward(dx_c, d[5], m, conv_weight.data(), conv_bias.data(), initial, true,
                                                        segments, conv_weight.grad_in_place(), conv_bias.grad_in_place(), dx);
            });
        return {dx, of_conv.dweight, of_conv.dbias, of_conv.dinitial, g.dw.w_q, g.dw.w_k, g.dw.w_v, g.dw.g};
      });
  return {{y[0], y[1], y[2], y[3], y[4]}, y[5]};
}

Variable mlstm_output(const Variable& h, const Variable& w, const Variable& skip, const Variable& x_c, const Variable& z,
                      double eps) {
  if (!kernels::mlstm_output_serves(h.data()))
    return swiglu(z, reshape(cast(head_norm(h, w, eps), x_c.dtype()), x_c.shape()) + skip * x_c);
  const auto out = kernels::mlstm_output_forward(h.data(), w.data(), skip.data(), x_c.data(), z.data(), eps);
  return record("mlstm_output", {h, w, skip, x_c, z}, out.y,
                [w, skip, out, eps, h = h.data(), c = x_c.data(), z = z.data()](const Tensor& dy) -> Grads {
                  auto g = kernels::mlstm_output_backward(dy, h, w.data(), skip.data(), c, z, out.mean, out.rstd, eps,
                                                          w.grad_in_place(), skip.grad_in_place());
                  return {g.dh.to(h.dtype()), g.dw, g.dskip, g.dx_c, g.dz};
                });
}

}  // namespace krait::autograd

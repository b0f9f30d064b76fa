#include "autograd/mlstm_block.h"

#include "autograd/activation.h"
#include "autograd/block_linear.h"
#include "autograd/elementwise.h"
#include "autograd/gate_linear.h"
#include "autograd/head_norm.h"
#include "autograd/shape.h"
#include "kernels/mlstm_block.h"

namespace krait::autograd {

MlstmHalves mlstm_halves(const Variable& up) {
  KRAIT_CHECK(up.ndim() >= 1 && up.size(-1) % 2 == 0, "mlstm_halves: {} has no halves", up.shape());
  const int64_t e = up.size(-1) / 2, last = up.ndim() - 1;
  const Tensor x = up.data().slice(last, 0, e), z = up.data().slice(last, e, 2 * e);
  const Vars y = record("mlstm_halves", {up}, {x, x, z},
                        [shape = x.shape(), dtype = up.dtype(), device = up.device()](const std::vector<Tensor>& d) -> Grads {
                          const auto or_zero = [&](const Tensor& t) { return t.defined() ? t : zeros(shape, dtype, device); };
                          return {kernels::mlstm_join(or_zero(d[0]), or_zero(d[1]), or_zero(d[2]))};
                        });
  return {y[0], y[1], y[2]};
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

#include "autograd/slstm.h"

#include <array>

#include "kernels/matmul.h"

namespace krait::autograd {

RecurrentOut slstm(const Variable& wx, const Variable& R, const Variable& bias, const Variable& state,
                   const Tensor& segments, SlstmForget forget) {
  const auto out = kernels::slstm_forward(wx.data(), R.data(), bias.data(), state.data(), segments, forget,
                                          wants_grad({wx, R, bias, state}));
  const Vars y = record("slstm", {wx, R, bias, state}, {out.y, out.state},
                        [out, R, weight = R.data(), bias, segments,
                         want = state.requires_grad()](const std::vector<Tensor>& d) -> Grads {
                          auto g = kernels::slstm_backward(d[0], d[1], weight, out, segments, want,
                                                           R.grad_in_place(), bias.grad_in_place());
                          return {g.dx, g.dw, g.dbias.defined() ? g.dbias.to(bias.dtype()) : g.dbias, g.dstate};
                        });
  return {y[0], y[1]};
}

namespace {

// x (b, l, h p) as (h, b l, p); a gate of (b, l, 4, h, p) likewise.
Tensor by_head(const Tensor& x, int64_t heads) {
  return x.view({x.size(0) * x.size(1), heads, x.size(2) / heads}).permute({1, 0, 2});
}
Tensor gate(const Tensor& all, int64_t g) {
  return all.view({all.size(0) * all.size(1), 4, all.size(3), all.size(4)}).select(1, g).permute({1, 0, 2});
}

}  // namespace

Variable slstm_gates(const Variable& x_if, const Variable& x_zo, const Variable& w_i, const Variable& w_f,
                     const Variable& w_z, const Variable& w_o) {
  const std::array<Variable, 4> w{w_i, w_f, w_z, w_o};
  const int64_t h = w_i.size(0), p = w_i.size(1);
  KRAIT_CHECK(x_if.ndim() == 3 && x_if.size(2) == h * p && x_zo.shape() == x_if.shape(),
              "slstm_gates: inputs are {} and {}, expected (b, l, {}) to match the weights {}", x_if.shape(),
              x_zo.shape(), h * p, w_i.shape());
  for (const Variable& v : w)
    KRAIT_CHECK(v.shape() == (Shape{h, p, p}), "slstm_gates: a weight is {}, expected {}", v.shape(), Shape{h, p, p});
  const std::array<Tensor, 2> x{x_if.data().contiguous(), x_zo.data().contiguous()};
  Tensor wx = empty({x_if.size(0), x_if.size(1), 4, h, p}, x_if.dtype(), x_if.device());
  for (size_t g = 0; g < 4; ++g) {
    Tensor to = gate(wx, static_cast<int64_t>(g));
    kernels::matmul_out(to, by_head(x[g / 2], h), w[g].data(), false, true);
  }
  return record("slstm_gates", {x_if, x_zo, w_i, w_f, w_z, w_o}, wx, [x, w, h](const Tensor& dy) -> Grads {
    const Tensor d = dy.contiguous();
    Grads grads(6);
    for (size_t g = 0; g < 4; ++g) {
      const Tensor dg = gate(d, static_cast<int64_t>(g));
      Tensor& dx = grads[g / 2];
      if (!dx.defined()) dx = empty_like(x[g / 2]);
      Tensor to = by_head(dx, h);
      kernels::matmul_out(to, dg, w[g].data(), false, false, 1.0, g % 2 == 1 ? 1.0 : 0.0);
      if (!w[g].requires_grad()) continue;
      const Tensor sum = w[g].grad_in_place();
      Tensor dw = sum.defined() ? sum : empty_like(w[g].data());
      kernels::matmul_out(dw, dg, by_head(x[g / 2], h), true, false, 1.0, sum.defined() ? 1.0 : 0.0);
      if (!sum.defined()) grads[2 + g] = dw;
    }
    return grads;
  });
}

}  // namespace krait::autograd

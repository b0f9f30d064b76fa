#include "autograd/mamba_inner.h"

#include <algorithm>

#include "kernels/accumulate.h"
#include "kernels/causal_conv1d.h"
#include "kernels/linear.h"
#include "kernels/selective_scan.h"

namespace krait::autograd {

namespace {

using kernels::Epilogue;

Tensor linear_of(const Tensor& x, const Tensor& w) {
  return kernels::linear_forward(x, w, {}, Epilogue::none, false).y;
}

Tensor buffer_of(const Variable& v) { return v.accumulates_in_place() ? v.grad() : Tensor{}; }

// Gradients of y = x w^T; dw is undefined when it went into w's buffer.
kernels::LinearGrad linear_gradient(const Tensor& dy, const Tensor& x, const Variable& w) {
  const Tensor buffer = buffer_of(w);
  auto grad = kernels::linear_backward(dy, x, w.data(), {}, Epilogue::none,
                                       {.dx = true, .dw = w.requires_grad(), .db = false}, buffer);
  if (buffer.defined()) grad.dw = {};
  return grad;
}

void copy_columns(Tensor& to, int64_t begin, const Tensor& from) {
  Tensor columns = to.slice(-1, begin, begin + from.size(-1));
  copy_(columns, from);
}

// The two halves of xz, and the columns of dbc = [d; B; C].
struct Sizes {
  explicit Sizes(const MambaInnerArguments& in) : e(in.A.size(0)), n(in.A.size(1)), r(in.dt_proj.size(1)) {}
  Tensor x(const Tensor& xz) const { return xz.slice(-1, 0, e); }
  Tensor z(const Tensor& xz) const { return xz.slice(-1, e, 2 * e); }
  Tensor d(const Tensor& dbc) const { return dbc.slice(-1, 0, r); }
  Tensor B(const Tensor& dbc) const { return dbc.slice(-1, r, r + n); }
  Tensor C(const Tensor& dbc) const { return dbc.slice(-1, r + n, r + 2 * n); }
  int64_t e, n, r;
};

kernels::CausalConv1dOut convolve(const MambaInnerArguments& in) {
  return kernels::causal_conv1d_forward(Sizes(in).x(in.xz.data()), in.conv_weight.data(), in.conv_bias.data(),
                                        in.conv_state.data(), true, in.segments);
}

kernels::SelectiveScanInputs scan_inputs(const MambaInnerArguments& in, const Tensor& x, const Tensor& dbc) {
  const Sizes sizes(in);
  kernels::SelectiveScanInputs scan;
  scan.x = x;
  scan.dt = linear_of(sizes.d(dbc), in.dt_proj.data());
  scan.A = in.A.data();
  scan.B = sizes.B(dbc);
  scan.C = sizes.C(dbc);
  scan.D = in.D.data();
  scan.z = sizes.z(in.xz.data());
  scan.dt_bias = in.dt_bias.data();
  scan.h0 = in.ssm_state.data();
  scan.segments = in.segments;
  return scan;
}

}  // namespace

MambaInnerOut mamba_inner(const MambaInnerArguments& in) {
  const Vars inputs{in.xz, in.conv_weight, in.conv_bias, in.x_proj,     in.dt_proj,
                    in.dt_bias, in.A,      in.D,         in.conv_state, in.ssm_state};
  const bool tape =
      recording() && std::any_of(inputs.begin(), inputs.end(), [](const Variable& v) { return v.requires_grad(); });
  auto [x, conv_state] = convolve(in);
  const Tensor dbc = linear_of(x, in.x_proj.data());
  auto [y, ssm_state, states] = kernels::selective_scan_forward(scan_inputs(in, x, dbc), tape);

  const auto backward = [in, dbc, states = states](const std::vector<Tensor>& d) -> Grads {
    const Sizes sizes(in);
    Tensor again = convolve(in).y;
    auto scan = kernels::selective_scan_backward(d[0], d[2], scan_inputs(in, again, dbc), states);
    // Tensors go as soon as they have served: the peak of a training step is here.
    Tensor dxz = empty_like(in.xz.data());
    copy_columns(dxz, sizes.e, scan.dz);
    scan.dz = {};
    const auto of_dt = linear_gradient(scan.ddt, sizes.d(dbc), in.dt_proj);
    scan.ddt = {};
    Tensor ddbc = empty_like(dbc);
    copy_columns(ddbc, 0, of_dt.dx);
    copy_columns(ddbc, sizes.r, scan.dB);
    copy_columns(ddbc, sizes.r + sizes.n, scan.dC);
    auto of_x = linear_gradient(ddbc, again, in.x_proj);
    again = {};
    kernels::accumulate(scan.dx, of_x.dx);
    of_x.dx = {};
    auto conv = kernels::causal_conv1d_backward(scan.dx, d[1], sizes.x(in.xz.data()), in.conv_weight.data(),
                                                in.conv_bias.data(), in.conv_state.data(), true, in.segments,
                                                buffer_of(in.conv_weight), buffer_of(in.conv_bias));
    copy_columns(dxz, 0, conv.dx);
    return {dxz,          conv.dweight, conv.dbias, of_x.dw,       of_dt.dw,
            scan.ddt_bias, scan.dA,     scan.dD,    conv.dinitial, scan.dh0};
  };
  const Vars out = record("mamba_inner", inputs, {y, conv_state, ssm_state}, backward);
  return {out[0], out[1], out[2]};
}

}  // namespace krait::autograd

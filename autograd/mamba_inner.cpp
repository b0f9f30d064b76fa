#include "autograd/mamba_inner.h"

#include "autograd/conv_filter.h"
#include "autograd/sequence_exchange.h"
#include "kernels/causal_conv1d.h"
#include "kernels/elementwise.h"
#include "kernels/linear.h"
#include "kernels/matmul.h"
#include "kernels/selective_scan.h"

namespace krait::autograd {

namespace {

using kernels::Epilogue;

Tensor linear_of(const Tensor& x, const Tensor& w) {
  return kernels::linear_forward(x, w, {}, Epilogue::none, false).y;
}

// Gradient of w in y = x w^T; undefined when it went into w's buffer.
Tensor weight_gradient(const Tensor& dy, const Tensor& x, const Variable& w) {
  if (!w.requires_grad()) return {};
  const Tensor buffer = w.grad_in_place();
  Tensor dw = buffer.defined() ? buffer : empty_like(w.data());
  kernels::matmul_out(dw, dy.flatten_leading(), x.flatten_leading(), true, false, 1.0, buffer.defined() ? 1.0 : 0.0);
  return buffer.defined() ? Tensor{} : dw;
}

// The sum over the members that have the other channels, in place.
void sum_members(const Tensor& t, const comm::GroupPtr& group) {
  if (group && group->size() > 1) group->all_reduce(t).wait();
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

kernels::CausalConv1dOut convolve(const MambaInnerArguments& in, const ConvFilter& filter, const Tensor& history) {
  return kernels::causal_conv1d_forward(Sizes(in).x(in.xz.data()), filter.weight, filter.bias, history, true, in.segments);
}

LeftHalo halo_of(const MambaInnerArguments& in) {
  if (!in.pieces.several()) return {};
  return {Sizes(in).x(in.xz.data()), in.conv_weight.size(-1) - 1, in.pieces.group, in.segments};
}

// h0: the state that enters; with several pieces not in.ssm_state but what the pieces before this one leave.
kernels::SelectiveScanInputs scan_inputs(const MambaInnerArguments& in, const Tensor& x, const Tensor& dbc,
                                         const Tensor& h0) {
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
  scan.h0 = h0;
  scan.segments = in.segments;
  return scan;
}

// What lies before the own piece, and what the backward needs of the others.
struct Entered { LeftHalo halo; Tensor h0, decays; };

// The state that leaves the last piece.
Tensor enter(Entered& entered, const MambaInnerArguments& in, const Tensor& x, const Tensor& dbc) {
  for (const Variable* state : {&in.conv_state, &in.ssm_state}) check_carried("mamba_inner", in.pieces, *state);
  entered.h0 = in.ssm_state.data();
  if (!in.pieces.several()) return {};
  const auto own = kernels::selective_scan_summary(scan_inputs(in, x, dbc, {}));
  const std::vector<Tensor> all = gather_pieces({own.state, own.deltas}, in.pieces);
  entered.decays = cut_decays(kernels::exp(kernels::mul(in.A.data(), all[1].unsqueeze(-1))), in.pieces);
  const PassedState state = pass_states(all[0], entered.decays, in.ssm_state.data(), in.pieces);
  entered.h0 = state.before;
  return state.last;
}

kernels::SelectiveScanGrad scan_gradient(const MambaInnerArguments& in, const kernels::SelectiveScanInputs& scan,
                                         const Entered& entered, const Tensor& dy, const Tensor& dlast,
                                         const Tensor& states, const kernels::SelectiveScanWants& wants) {
  check_carried("mamba_inner", in.pieces, {}, dlast);
  if (!in.pieces.several()) return kernels::selective_scan_backward(dy, dlast, scan, states, wants);
  const Tensor upstream = dy.defined() ? dy : zeros_like(scan.x);
  const Tensor own = kernels::selective_scan_initial_gradient(upstream, scan);
  const Tensor behind = pass_gradients(gather_pieces({own}, in.pieces)[0], entered.decays, in.pieces);
  auto grad = kernels::selective_scan_backward(upstream, behind, scan, states, wants);
  grad.dh0 = {};
  return grad;
}

Grads differentiate(const MambaInnerArguments& in, const ConvFilter& filter, const Entered& entered, const Tensor& dbc,
                    const Tensor& states, const Tensor& dout, const Tensor& dconv_state, const Tensor& dssm_state) {
  const Sizes sizes(in);
  // Tensors go as soon as they have served: the peak of a training step is here.
  const Tensor history = entered.halo.history(in.conv_state.data());
  Tensor again = convolve(in, filter, history).y, dxz = empty_like(in.xz.data()), dw_out;
  kernels::SelectiveScanGrad scan;
  {
    const Tensor dy = dout.defined() ? kernels::matmul(dout, in.out_proj.data()) : Tensor{};
    scan = scan_gradient(in, scan_inputs(in, again, dbc, entered.h0), entered, dy, dssm_state, states,
                         {.dz = sizes.z(dxz), .y = dout.defined()});
  }
  if (dout.defined()) dw_out = weight_gradient(dout, scan.y, in.out_proj);
  scan.y = {};
  Tensor ddbc = empty_like(dbc), of_d = sizes.d(ddbc);
  kernels::matmul_out(of_d, scan.ddt, in.dt_proj.data());
  const Tensor dw_dt = weight_gradient(scan.ddt, sizes.d(dbc), in.dt_proj);
  scan.ddt = {};
  copy_columns(ddbc, sizes.r, scan.dB);
  copy_columns(ddbc, sizes.r + sizes.n, scan.dC);
  sum_members(ddbc, in.tensor);
  kernels::matmul_out(scan.dx, ddbc, in.x_proj.data(), false, false, 1.0, 1.0);
  const Tensor dw_x = weight_gradient(ddbc, again, in.x_proj);
  again = {};
  const auto conv = kernels::causal_conv1d_backward(scan.dx, dconv_state, sizes.x(in.xz.data()), filter.weight,
                                                    filter.bias, history, true, in.segments,
                                                    in.conv_weight.grad_in_place(), in.conv_bias.grad_in_place(), sizes.x(dxz));
  const bool exchanged = entered.halo.rows().defined();
  if (exchanged) entered.halo.add_gradient(sizes.x(dxz), conv.dinitial);
  return {dxz,
          in_dtype_of(in.conv_weight, conv.dweight),
          in_dtype_of(in.conv_bias, conv.dbias),
          dw_x,
          dw_dt,
          scan.ddt_bias,
          scan.dA,
          scan.dD,
          dw_out,
          exchanged ? Tensor() : conv.dinitial,
          scan.dh0};
}

}  // namespace

MambaInnerOut mamba_inner(const MambaInnerArguments& in) {
  const Vars inputs{in.xz, in.conv_weight, in.conv_bias, in.x_proj,     in.dt_proj,  in.dt_bias,
                    in.A,  in.D,           in.out_proj,  in.conv_state, in.ssm_state};
  const bool tape = wants_grad(inputs);
  const ConvFilter filter(in.conv_weight, in.conv_bias, in.xz.dtype());
  Entered entered{halo_of(in), {}, {}};
  auto [x, conv_state] = convolve(in, filter, entered.halo.history(in.conv_state.data()));
  const Tensor dbc = linear_of(x, in.x_proj.data());
  sum_members(dbc, in.tensor);
  const Tensor last = enter(entered, in, x, dbc);
  auto [y, ssm_state, states] = kernels::selective_scan_forward(scan_inputs(in, x, dbc, entered.h0), tape);
  if (last.defined()) ssm_state = last;
  const Vars out = record("mamba_inner", inputs, {linear_of(y, in.out_proj.data()), conv_state, ssm_state},
                          [in, filter, entered, dbc, states = states](const std::vector<Tensor>& d) -> Grads {
                            return differentiate(in, filter, entered, dbc, states, d[0], d[1], d[2]);
                          });
  return {out[0], out[1], out[2]};
}

}  // namespace krait::autograd

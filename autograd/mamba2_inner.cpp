#include "autograd/mamba2_inner.h"

#include "autograd/conv_filter.h"
#include "autograd/sequence_exchange.h"
#include "kernels/causal_conv1d.h"
#include "kernels/linear.h"
#include "kernels/ssd_outputs.h"
#include "kernels/ssd_time_step.h"

namespace krait::autograd {

namespace {

using kernels::Epilogue;

// The parts of zxbcdt and of [x; B; C], as views.
struct Sizes {
  explicit Sizes(const Mamba2InnerArguments& in)
      : h(in.sizes.heads), g(in.sizes.groups), n(in.sizes.d_state), e(in.norm_weight.data().numel()) {
    KRAIT_CHECK(e > 0 && e % h == 0 && in.zxbcdt.size(2) >= 2 * e + 2 * g * n + h,
                "mamba2_inner: {} does not split into [z; x; B; C; dt] of {} channels, {} heads and {} groups of {}",
                in.zxbcdt.shape(), e, h, g, n);
  }
  Tensor z(const Tensor& t) const { return t.slice(2, 0, e); }
  Tensor xbc(const Tensor& t) const { return t.slice(2, e, 2 * e + 2 * g * n); }
  Tensor dt(const Tensor& t) const { return t.slice(2, 2 * e + 2 * g * n, 2 * e + 2 * g * n + h); }
  Tensor rest(const Tensor& t) const { return t.slice(2, 2 * e + 2 * g * n + h, t.size(2)); }
  Tensor x(const Tensor& xbc) const { return heads(xbc.slice(2, 0, e)); }
  Tensor B(const Tensor& xbc) const { return groups(xbc.slice(2, e, e + g * n)); }
  Tensor C(const Tensor& xbc) const { return groups(xbc.slice(2, e + g * n, e + 2 * g * n)); }
  Tensor heads(const Tensor& t) const { return t.view({t.size(0), t.size(1), h, e / h}); }
  Tensor groups(const Tensor& t) const { return t.view({t.size(0), t.size(1), g, n}); }
  int64_t h, g, n, e;
};

GatedNorm norm_of(const Mamba2InnerArguments& in) {
  return {in.norm_members, in.sizes.groups, in.norm_eps, in.norm_first};
}

kernels::CausalConv1dOut convolve(const Mamba2InnerArguments& in, const ConvFilter& filter, const Tensor& history) {
  return kernels::causal_conv1d_forward(Sizes(in).xbc(in.zxbcdt.data()), filter.weight, filter.bias, history, true,
                                        in.options.segments);
}

LeftHalo halo_of(const Mamba2InnerArguments& in) {
  const SequencePieces& pieces = in.options.pieces;
  if (!pieces.several()) return {};
  return {Sizes(in).xbc(in.zxbcdt.data()), in.conv_weight.size(-1) - 1, pieces.group, in.options.segments};
}

kernels::SsdInput scan_input(const Mamba2InnerArguments& in, const Tensor& xbc, const Tensor& initial_state) {
  const Sizes sizes(in);
  const auto time = kernels::ssd_time_step_forward(sizes.dt(in.zxbcdt.data()), in.dt_bias.data(), in.A_log.data(),
                                                   in.dt_low, in.dt_high);
  return {sizes.x(xbc), time.dt, time.a, sizes.B(xbc), sizes.C(xbc), in.D.data(), initial_state,
          in.options.segments, in.options.chunk};
}

Grads differentiate(const Mamba2InnerArguments& in, const ConvFilter& filter, const LeftHalo& halo, const SsdPiece& piece,
                    const Tensor& y, const Tensor& rstd, const Tensor& dout, const Tensor& dconv_state, const Tensor& dssm_state) {
  const Sizes sizes(in);
  const Tensor &zxbcdt = in.zxbcdt.data(), history = halo.history(in.conv_state.data());
  // Tensors go as soon as they have served: the peak of a training step is here.
  Tensor dzxbcdt = empty_like(zxbcdt), dy, dnorm, dweight, dbias;
  if (dout.defined()) {
    const bool project = in.out_weight.defined();
    Tensor up = !project ? dout
                         : kernels::linear_backward(dout, y, in.out_weight.data(), {}, Epilogue::none, {true, false, false}).dx;
    auto norm = norm_of(in).backward(up, y, sizes.z(zxbcdt), in.norm_weight.data(), rstd, in.norm_weight.grad_in_place(),
                                     sizes.z(dzxbcdt), project);
    up = {};
    dy = norm.dx;
    dnorm = norm.dw;
    if (project) {
      const Tensor weight_sum = in.out_weight.grad_in_place(), bias_sum = in.out_bias.grad_in_place();
      auto out = kernels::linear_backward(dout, norm.y, in.out_weight.data(), {}, Epilogue::none,
                                          {false, in.out_weight.requires_grad(), in.out_bias.requires_grad()}, weight_sum,
                                          bias_sum);
      if (!weight_sum.defined()) dweight = out.dw;
      if (!bias_sum.defined()) dbias = out.db;
    }
  } else {
    Tensor dz = sizes.z(dzxbcdt);
    zero_(dz);
    dy = zeros_like(y);
  }
  Tensor dxbc;
  kernels::SsdGrad scan;
  {
    const Tensor xbc = convolve(in, filter, history).y;
    dxbc = empty_like(xbc);
    scan.dx = sizes.x(dxbc);
    scan.dB = sizes.B(dxbc);
    scan.dC = sizes.C(dxbc);
    const kernels::SsdInput input = scan_input(in, xbc, piece.before);
    kernels::ssd_backward_into(scan, sizes.heads(dy), piece.gradient_behind(input, sizes.heads(dy), dssm_state), input);
    dy = {};
  }
  scan.dx = scan.dB = scan.dC = {};
  const auto time = kernels::ssd_time_step_backward(scan.ddt, scan.da, sizes.dt(zxbcdt), in.dt_bias.data(),
                                                    in.A_log.data(), in.dt_low, in.dt_high, sizes.dt(dzxbcdt));
  const auto conv = kernels::causal_conv1d_backward(
      dxbc, dconv_state, sizes.xbc(zxbcdt), filter.weight, filter.bias, history, true, in.options.segments,
      in.conv_weight.grad_in_place(), in.conv_bias.grad_in_place(), sizes.xbc(dzxbcdt));
  if (halo.rows().defined()) halo.add_gradient(sizes.xbc(dzxbcdt), conv.dinitial);
  if (Tensor rest = sizes.rest(dzxbcdt); rest.numel() > 0) zero_(rest);
  return {dzxbcdt,
          in_dtype_of(in.conv_weight, conv.dweight),
          in_dtype_of(in.conv_bias, conv.dbias),
          time.dbias.to(in.dt_bias.dtype()),
          time.dA_log.to(in.A_log.dtype()),
          scan.dD,
          dnorm,
          dweight,
          dbias,
          halo.rows().defined() ? Tensor() : conv.dinitial,
          piece.gradient_before(scan.dinitial_state)};
}

}  // namespace

Mamba2InnerOut mamba2_inner(const Mamba2InnerArguments& in) {
  const Sizes sizes(in);
  const Tensor& zxbcdt = in.zxbcdt.data();
  const ConvFilter filter(in.conv_weight, in.conv_bias, zxbcdt.dtype());
  const LeftHalo halo = halo_of(in);
  kernels::CausalConv1dOut conv = convolve(in, filter, halo.history(in.conv_state.data()));
  for (const Variable* state : {&in.conv_state, &in.ssm_state}) check_carried("mamba2_inner", in.options.pieces, *state);
  kernels::SsdInput scan = scan_input(in, conv.y, in.ssm_state.data());
  SsdPiece piece(scan, in.options.pieces);
  scan.initial_state = piece.before;
  kernels::SsdOut states;
  if (in.keep_state) {
    states = kernels::ssd_forward(scan);
    states.final_state = piece.take_last(states.final_state);
  } else {
    states.y = kernels::ssd_outputs(scan);
  }
  scan = {};
  conv.y = {};
  const Tensor y = states.y.view({zxbcdt.size(0), zxbcdt.size(1), sizes.e});
  const auto norm = norm_of(in).forward(y, sizes.z(zxbcdt), in.norm_weight.data());
  Tensor out = norm.y;
  if (in.out_weight.defined())
    out = kernels::linear_forward(out, in.out_weight.data(), in.out_bias.data(), Epilogue::none, false).y;
  const Vars results =
      record("mamba2_inner",
             {in.zxbcdt, in.conv_weight, in.conv_bias, in.dt_bias, in.A_log, in.D, in.norm_weight, in.out_weight,
              in.out_bias, in.conv_state, in.ssm_state},
             {out, conv.final_state, states.final_state}, [in, filter, halo, piece, y, rstd = norm.rstd](const std::vector<Tensor>& d) -> Grads {
               return differentiate(in, filter, halo, piece, y, rstd, d[0], d[1], d[2]);
             });
  return {results[0], results[1], results[2]};
}

}  // namespace krait::autograd

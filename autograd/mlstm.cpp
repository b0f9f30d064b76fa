#include "autograd/mlstm.h"

#include "autograd/mlstm_block.h"
#include "kernels/mlstm_block.h"

namespace krait::autograd {

namespace {

// The own piece of the sequence, from the state that the pieces before it leave.
struct Piece {
  kernels::MlstmInputs in;
  Tensor decays;
  kernels::MlstmState last;
};

Piece enter(kernels::MlstmInputs in, const MlstmOptions& options, const SequencePieces& pieces) {
  const kernels::MlstmState carried = in.initial;
  const kernels::MlstmSummary sum = kernels::mlstm_summary(in, options);
  const std::vector<Tensor> all = gather_pieces({sum.own.c, sum.own.n, sum.own.m, sum.log_decay}, pieces);
  const PassedScale m = pass_scales(all[3], all[2], carried.m, pieces);
  const PassedState c = pass_states(scale_leading(m.own_scales, all[0]), m.decays, carried.c, pieces);
  const PassedState n = pass_states(scale_leading(m.own_scales, all[1]), m.decays, carried.n, pieces);
  in.initial = {c.before, n.before, c.before.defined() ? m.before : Tensor()};
  return {in, m.decays, {c.last, n.last, m.last}};
}

// With the output's backward in front, where there is one.
struct Upstream {
  kernels::MlstmUpstream cell;
  kernels::MlstmOutputGrad output;
};

Upstream through_output(const std::vector<Tensor>& d, const MlstmHeadOutput& output, const kernels::MlstmOut& out,
                        const kernels::MlstmOutput& normed) {
  Upstream up{{d[0], d[1], d[2], {}}, {}};
  if (!output.w.defined() || !d[0].defined()) return up;
  up.output = kernels::mlstm_output_backward(d[0], out.h, output.w.data(), output.skip.data(), output.x_c.data(),
                                             output.z.data(), normed.mean, normed.rstd, output.eps, output.w.grad_in_place(),
                                             output.skip.grad_in_place(),
                                             output.gradient ? output.gradient->half(1) : Tensor());
  up.cell.dh = up.output.dh;
  up.cell.dots = up.output.dots;
  return up;
}

}  // namespace

MlstmResult mlstm(const Variable& q, const Variable& k, const Variable& v, const Variable& i, const Variable& f,
                  const MlstmMemory& initial, const Tensor& segments, const MlstmOptions& wanted,
                  const SequencePieces& pieces, const MlstmHeadOutput& output) {
  if (output.w.defined() && !kernels::mlstm_output_serves(v.data())) {
    MlstmResult cell = mlstm(q, k, v, i, f, initial, segments, wanted, pieces);
    cell.h = mlstm_output(cell.h, output.w, output.skip, output.x_c, output.z, output.eps);
    return cell;
  }
  check_carried("mlstm", pieces, initial.c);
  check_carried("mlstm", pieces, initial.n);
  Vars inputs{q, k, v, i, f, initial.c, initial.n};
  if (output.w.defined()) inputs.insert(inputs.end(), {output.w, output.skip, output.x_c, output.z});
  MlstmOptions options = wanted;
  options.keep_states = wants_grad(inputs);
  options.round_h = output.w.defined();
  Piece piece{{q.data(), k.data(), v.data(), i.data(), f.data(), {initial.c.data(), initial.n.data(), initial.m}, segments},
              {}, {}};
  if (pieces.several()) piece = enter(piece.in, options, pieces);
  const kernels::MlstmOut out = kernels::mlstm_forward(piece.in, options);
  kernels::MlstmOutput normed;
  if (output.w.defined())
    normed = kernels::mlstm_output_forward(out.h, output.w.data(), output.skip.data(), output.x_c.data(), output.z.data(),
                                           output.eps);
  const kernels::MlstmState last = pieces.several() ? piece.last : out.last;
  const Vars y = record("mlstm", inputs, {output.w.defined() ? normed.y : out.h, last.c, last.n},
                        [piece, out, options, pieces, output, normed](const std::vector<Tensor>& d) -> Grads {
                          Upstream all = through_output(d, output, out, normed);
                          kernels::MlstmUpstream& up = all.cell;
                          if (pieces.several()) {
                            for (const Tensor& dlast : {d[1], d[2]}) check_carried("mlstm", pieces, {}, dlast);
                            if (!up.dh.defined()) up.dh = zeros(out.h.shape(), accum_dtype(out.h.dtype()), out.h.device());
                            const auto own = kernels::mlstm_initial_gradient(up.dh, piece.in, out, options, up.dots);
                            const std::vector<Tensor> parts = gather_pieces({own.dc0, own.dn0}, pieces);
                            up.dc_last = pass_gradients(parts[0], piece.decays, pieces);
                            up.dn_last = pass_gradients(parts[1], piece.decays, pieces);
                          }
                          auto grad = kernels::mlstm_backward(up, piece.in, out, options);
                          if (pieces.several()) grad.dc0 = grad.dn0 = {};
                          if (pieces.joined.defined()) {
                            // f has no gradient before a zero state; the kernel leaves the rounding errors of one.
                            Tensor first = grad.df.select(1, 0);
                            copy_(first, scale_leading(pieces.joined.select(0, pieces.rank()), first));
                          }
                          Grads grads{grad.dq, grad.dk, grad.dv, grad.di, grad.df, grad.dc0, grad.dn0};
                          const kernels::MlstmOutputGrad& o = all.output;
                          if (output.w.defined()) grads.insert(grads.end(), {o.dw, o.dskip, o.dx_c, o.dz});
                          return grads;
                        });
  return {y[0], {y[1], y[2], last.m}};
}

}  // namespace krait::autograd

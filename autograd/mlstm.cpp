#include "autograd/mlstm.h"

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

}  // namespace

MlstmResult mlstm(const Variable& q, const Variable& k, const Variable& v, const Variable& i, const Variable& f,
                  const MlstmMemory& initial, const Tensor& segments, const MlstmOptions& options,
                  const SequencePieces& pieces) {
  check_carried("mlstm", pieces, initial.c);
  check_carried("mlstm", pieces, initial.n);
  Piece piece{{q.data(), k.data(), v.data(), i.data(), f.data(), {initial.c.data(), initial.n.data(), initial.m}, segments},
              {}, {}};
  if (pieces.several()) piece = enter(piece.in, options, pieces);
  const kernels::MlstmOut out = kernels::mlstm_forward(piece.in, options);
  const kernels::MlstmState last = pieces.several() ? piece.last : out.last;
  const Vars y = record("mlstm", {q, k, v, i, f, initial.c, initial.n}, {out.h, last.c, last.n},
                        [piece, out, options, pieces](const std::vector<Tensor>& d) -> Grads {
                          kernels::MlstmUpstream up{d[0], d[1], d[2]};
                          if (pieces.several()) {
                            for (const Tensor& dlast : {d[1], d[2]}) check_carried("mlstm", pieces, {}, dlast);
                            if (!up.dh.defined()) up.dh = zeros_like(out.h);
                            const auto own = kernels::mlstm_initial_gradient(up.dh, piece.in, out, options);
                            const std::vector<Tensor> all = gather_pieces({own.dc0, own.dn0}, pieces);
                            up.dc_last = pass_gradients(all[0], piece.decays, pieces);
                            up.dn_last = pass_gradients(all[1], piece.decays, pieces);
                          }
                          auto grad = kernels::mlstm_backward(up, piece.in, out, options);
                          if (pieces.several()) grad.dc0 = grad.dn0 = {};
                          if (pieces.joined.defined()) {
                            // f has no gradient before a zero state; the kernel leaves the rounding errors of one.
                            Tensor first = grad.df.select(1, 0);
                            copy_(first, scale_leading(pieces.joined.select(0, pieces.rank()), first));
                          }
                          return {grad.dq, grad.dk, grad.dv, grad.di, grad.df, grad.dc0, grad.dn0};
                        });
  return {y[0], {y[1], y[2], last.m}};
}

}  // namespace krait::autograd

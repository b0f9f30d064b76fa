#include "autograd/ssd.h"

#include <utility>

#include "kernels/elementwise.h"
#include "kernels/ssd.h"
#include "kernels/ssd_time_step.h"

namespace krait::autograd {

namespace {

Tensor or_zeros(const Tensor& dy, const Tensor& like) { return dy.defined() ? dy : zeros_like(like); }

}  // namespace

SsdPiece::SsdPiece(const kernels::SsdInput& in, const SequencePieces& pieces) : before(in.initial_state), pieces_(pieces) {
  if (!pieces.several()) return;
  kernels::SsdInput alone = in;
  alone.initial_state = {};
  const kernels::SsdSummary own = kernels::ssd_summary(alone);
  const std::vector<Tensor> all = gather_pieces({own.state, own.log_decay}, pieces);
  decays_ = cut_decays(kernels::exp(all[1]), pieces);
  const PassedState state = pass_states(all[0], decays_, in.initial_state, pieces);
  before = state.before;
  last_ = state.last;
}

Tensor SsdPiece::take_last(const Tensor& own_last) { return last_.defined() ? std::exchange(last_, {}) : own_last; }

Tensor SsdPiece::gradient_behind(const kernels::SsdInput& in, const Tensor& dy, const Tensor& dlast) const {
  check_carried("ssd", pieces_, {}, dlast);
  if (!pieces_.several()) return dlast;
  return pass_gradients(gather_pieces({kernels::ssd_initial_gradient(dy, in)}, pieces_)[0], decays_, pieces_);
}

Tensor SsdPiece::gradient_before(const Tensor& dinitial) const { return pieces_.several() ? Tensor() : dinitial; }

namespace {

// The recurrence over the own piece of the sequence.
struct Recurrence {
  Recurrence(const kernels::SsdInput& whole, const Variable& initial, const SequencePieces& pieces)
      : in(whole), piece(in, pieces) {
    check_carried("ssd", pieces, initial);
    in.initial_state = piece.before;
  }
  kernels::SsdOut forward() {
    kernels::SsdOut out = kernels::ssd_forward(in);
    out.final_state = piece.take_last(out.final_state);
    return out;
  }
  void backward_into(kernels::SsdGrad& g, const Tensor& dy, const Tensor& dlast) const {
    kernels::ssd_backward_into(g, dy, piece.gradient_behind(in, dy, dlast), in);
    g.dinitial_state = piece.gradient_before(g.dinitial_state);
  }
  kernels::SsdInput in;
  SsdPiece piece;
};

}  // namespace

SsdOut ssd(const Variable& x, const Variable& dt, const Variable& a, const Variable& B, const Variable& C,
           const Variable& D, const Variable& initial_state, const SsdOptions& options) {
  Recurrence run({x.data(), dt.data(), a.data(), B.data(), C.data(), D.data(), initial_state.data(),
                     options.segments, options.chunk}, initial_state, options.pieces);
  auto [y, final_state] = run.forward();
  const Vars out = record("ssd", {x, dt, a, B, C, D, initial_state}, {y, final_state},
                          [run](const std::vector<Tensor>& d) -> Grads {
                            const kernels::SsdInput& in = run.in;
                            kernels::SsdGrad g{empty_like(in.x), {}, {}, empty_like(in.B), empty_like(in.C), {}, {}};
                            run.backward_into(g, or_zeros(d[0], in.x), d[1]);
                            return {g.dx, g.ddt, g.da, g.dB, g.dC, g.dD, g.dinitial_state};
                          });
  return {out[0], out[1]};
}

SsdOut ssd_scan(const Variable& x, const Variable& a, const Variable& B, const Variable& C, int64_t chunk,
                const Variable& initial_state, const Tensor& segments, const SequencePieces& pieces) {
  return ssd(x, {}, a, B, C, {}, initial_state, {chunk, segments, pieces});
}

namespace {

// x, B, C as views of the packed tensor.
struct Split {
  Tensor x, B, C;
  Split(const Tensor& xbc, const SsdSizes& s) {
    const int64_t b = xbc.size(0), l = xbc.size(1), gn = s.groups * s.d_state, e = xbc.size(2) - 2 * gn;
    x = xbc.slice(2, 0, e).view({b, l, s.heads, e / s.heads});
    B = xbc.slice(2, e, e + gn).view({b, l, s.groups, s.d_state});
    C = xbc.slice(2, e + gn, e + 2 * gn).view({b, l, s.groups, s.d_state});
  }
};

}  // namespace

SsdOut ssd_packed(const Variable& xbc, const Variable& dt, const Variable& a, const Variable& D,
                  const Variable& initial_state, const SsdSizes& sizes, const SsdOptions& options) {
  KRAIT_CHECK(sizes.heads > 0 && sizes.groups > 0 && sizes.d_state > 0 && xbc.ndim() == 3 &&
                  xbc.size(2) > 2 * sizes.groups * sizes.d_state &&
                  (xbc.size(2) - 2 * sizes.groups * sizes.d_state) % sizes.heads == 0,
              "ssd_packed: {} does not split into {} heads and 2 x {} groups of {}", xbc.shape(), sizes.heads,
              sizes.groups, sizes.d_state);
  const Tensor packed = xbc.data().contiguous();
  const Split parts(packed, sizes);
  Recurrence run({parts.x, dt.data(), a.data(), parts.B, parts.C, D.data(), initial_state.data(), options.segments,
                     options.chunk}, initial_state, options.pieces);
  auto [y, final_state] = run.forward();
  const Shape joined{xbc.size(0), xbc.size(1), parts.x.size(2) * parts.x.size(3)};
  const Vars out = record("ssd_packed", {xbc, dt, a, D, initial_state}, {y.view(joined), final_state},
                          [run, packed, sizes](const std::vector<Tensor>& d) -> Grads {
                            const kernels::SsdInput& in = run.in;
                            Tensor dpacked = empty_like(packed);
                            const Split grads(dpacked, sizes);
                            kernels::SsdGrad g{grads.x, {}, {}, grads.B, grads.C, {}, {}};
                            const Tensor dy = d[0].defined() ? d[0].reshape(in.x.shape()) : or_zeros({}, in.x);
                            run.backward_into(g, dy, d[1]);
                            return {dpacked, g.ddt, g.da, g.dD, g.dinitial_state};
                          });
  return {out[0], out[1]};
}

SsdTimeStep ssd_time_step(const Variable& dt, const Variable& dt_bias, const Variable& A_log, double low,
                          double high) {
  auto [step, a] = kernels::ssd_time_step_forward(dt.data(), dt_bias.data(), A_log.data(), low, high);
  const Vars out = record("ssd_time_step", {dt, dt_bias, A_log}, {step, a},
                          [dt = dt.data(), bias = dt_bias.data(), A_log = A_log.data(), low,
                           high](const std::vector<Tensor>& d) -> Grads {
                            auto g = kernels::ssd_time_step_backward(d[0], d[1], dt, bias, A_log, low, high);
                            return {g.ddt, g.dbias.to(bias.dtype()), g.dA_log.to(A_log.dtype())};
                          });
  return {out[0], out[1]};
}

}  // namespace krait::autograd

#include "autograd/state_passing.h"

#include "kernels/elementwise.h"

namespace krait::autograd {

namespace {

// t (b, ..) with dimensions of 1 at the end, as many as `like` has.
Tensor beside(Tensor t, const Tensor& like) {
  while (t.ndim() < like.ndim()) t = t.unsqueeze(-1);
  return t.dtype() == like.dtype() ? t : t.to(like.dtype());
}

}  // namespace

Tensor scale_leading(const Tensor& factor, const Tensor& t) { return kernels::mul(beside(factor, t), t); }

SequencePieces sequence_pieces(const comm::GroupPtr& group, const Tensor& segments) {
  SequencePieces pieces{group, {}, {}};
  if (!pieces.several() || !segments.defined()) return pieces;
  const int64_t b = segments.size(0), l = segments.size(1), s = pieces.count();
  KRAIT_CHECK(l > 0, "sequence_pieces: the pieces are empty");
  Tensor ends = empty({2, b}, DType::i32, segments.device());
  Tensor first = ends.select(0, 0), last = ends.select(0, 1);
  copy_(first, segments.select(1, 0));
  copy_(last, segments.select(1, l - 1));
  Tensor all = empty({s, 2, b}, DType::i32, segments.device());
  group->all_gather(ends, all).wait();
  const Tensor ids = all.to(DType::f64), begins = ids.select(1, 0), stops = ids.select(1, 1);
  pieces.whole = kernels::equal(begins, stops).to(DType::f64);
  pieces.joined = ones({s, b}, DType::f64, segments.device());
  Tensor rest = pieces.joined.slice(0, 1, s);
  copy_(rest, kernels::equal(begins.slice(0, 1, s), stops.slice(0, 0, s - 1)).to(DType::f64));
  return pieces;
}

std::vector<Tensor> gather_pieces(const std::vector<Tensor>& own, const SequencePieces& pieces) {
  const int64_t s = pieces.count();
  int64_t length = 0;
  for (const Tensor& t : own) length += t.numel();
  const Tensor buffer = empty({length}, own.front().dtype(), own.front().device());
  int64_t at = 0;
  for (const Tensor& t : own) {
    Tensor part = buffer.slice(0, at, at + t.numel()).view(t.shape());
    copy_(part, t);
    at += t.numel();
  }
  Tensor all = buffer.unsqueeze(0);
  if (pieces.several()) {
    all = empty({s, length}, buffer.dtype(), buffer.device());
    pieces.group->all_gather(buffer, all).wait();
  }
  std::vector<Tensor> gathered;
  at = 0;
  for (const Tensor& t : own) {
    gathered.push_back(all.slice(1, at, at + t.numel()).view(t.shape().inserted(0, s)));
    at += t.numel();
  }
  return gathered;
}

Tensor cut_decays(const Tensor& decays, const SequencePieces& pieces) {
  return pieces.whole.defined() ? scale_leading(pieces.whole, decays) : decays;
}

PassedState pass_states(const Tensor& own, const Tensor& decays, const Tensor& initial, const SequencePieces& pieces) {
  PassedState state;
  Tensor h = initial;
  for (int64_t r = 0; r < pieces.count(); ++r) {
    if (r == pieces.rank()) {
      state.before = h;
      if (!pieces.last) break;
    }
    const Tensor piece = own.select(0, r);
    state.last = h.defined() ? kernels::add(scale_leading(decays.select(0, r), h), piece) : piece.clone();
    const bool edge = pieces.joined.defined() && r + 1 < pieces.count();
    h = edge ? scale_leading(pieces.joined.select(0, r + 1), state.last) : state.last;
  }
  if (!pieces.last) state.last = {};
  return state;
}

Tensor pass_gradients(const Tensor& gradients, const Tensor& decays, const SequencePieces& pieces) {
  Tensor lambda;
  for (int64_t r = pieces.count() - 1; r > pieces.rank(); --r) {
    const Tensor piece = gradients.select(0, r);
    lambda = lambda.defined() ? kernels::add(scale_leading(decays.select(0, r), lambda), piece) : piece;
    if (pieces.joined.defined()) lambda = scale_leading(pieces.joined.select(0, r), lambda);
  }
  return lambda;
}

PassedScale pass_scales(const Tensor& log_decays, const Tensor& own, const Tensor& initial,
                        const SequencePieces& pieces) {
  constexpr double kNothing = 1e30;  // -1e30 is below any m, and finite
  PassedScale out{empty_like(own), empty_like(own), {}, {}};
  Tensor m = initial.defined() ? initial : zeros_like(own.select(0, 0));
  for (int64_t r = 0; r < pieces.count(); ++r) {
    if (r == pieces.rank()) out.before = m;
    const Tensor own_m = own.select(0, r);
    Tensor through = kernels::add(log_decays.select(0, r), m);
    if (pieces.whole.defined()) {
      const Tensor whole = beside(pieces.whole.select(0, r), through);
      through = kernels::add(kernels::mul(whole, through), kernels::mul_scalar(kernels::add_scalar(whole, -1), kNothing));
    }
    out.last = kernels::maximum(through, own_m);
    Tensor decay = out.decays.select(0, r), scale = out.own_scales.select(0, r);
    copy_(decay, kernels::exp(kernels::sub(through, out.last)));
    copy_(scale, kernels::exp(kernels::sub(own_m, out.last)));
    const bool edge = pieces.joined.defined() && r + 1 < pieces.count();
    m = edge ? scale_leading(pieces.joined.select(0, r + 1), out.last) : out.last;
  }
  return out;
}

void check_carried(const char* op, const SequencePieces& pieces, const Variable& initial, const Tensor& dfinal) {
  KRAIT_CHECK(!pieces.several() || ((!recording() || !initial.requires_grad()) && !dfinal.defined()),
              "{}: a state that {} members of group '{}' share has no gradient; detach() it", op, pieces.count(),
              pieces.group->name());
}

}  // namespace krait::autograd

#include "kernels/moe.h"

#include "kernels/activation.h"

namespace krait::kernels {

MoeRouting moe_route(const Tensor& logits, const MoeOptions& options) {
  KRAIT_CHECK(logits.ndim() == 2 && (logits.dtype() == DType::f32 || logits.dtype() == DType::f64),
              "moe_route: logits are {}, expected fp32 or fp64 (tokens, slots)", describe(logits));
  const int64_t t = logits.size(0), n = logits.size(1), k = options.top_k;
  KRAIT_CHECK(options.experts >= 1 && options.experts <= n && k >= 1 && k <= n,
              "moe_route: {} experts and the {} best of {} slots; expected 1 to {} of each", options.experts, k, n, n);
  KRAIT_CHECK(t * k < (int64_t{1} << 31), "moe_route: {} tokens with {} choices each are too many; lower the micro-batch", t, k);
  const Device device = logits.device();
  MoeRouting r;
  r.index = empty({t, k}, DType::i32, device);
  r.weight = empty({t, k}, logits.dtype(), device);
  r.lse = empty({t}, logits.dtype(), device);
  r.counts = empty({n}, DType::i32, device);
  r.position = empty({t, k}, DType::i32, device);
  r.groups = {empty({options.experts + 1}, DType::i32, device), t * k, empty({t * k}, DType::i32, device), k};
  if (t == 0) {
    zero_(r.counts);
    zero_(r.groups.offsets);
    return r;
  }
  KRAIT_DISPATCH(device, moe_route(r, logits.contiguous(), options));
  return r;
}

MoeRouting moe_part(const MoeRouting& whole, int64_t first, int64_t experts) {
  KRAIT_CHECK(first >= 0 && experts >= 1 && first + experts <= whole.groups.groups(),
              "moe_part: experts from {} on do not lie in {}: {}", first, whole.groups.groups(), experts);
  if (experts == whole.groups.groups()) return whole;
  const Device device = whole.index.device();
  MoeRouting part = whole;
  part.position = empty(whole.position.shape(), DType::i32, device);
  part.groups.offsets = empty({experts + 1}, DType::i32, device);
  part.groups.order = empty(whole.groups.order.shape(), DType::i32, device);
  KRAIT_DISPATCH(device, moe_part(part, whole, first));
  return part;
}

MoeCounted moe_counted(const MoeRouting& routing, const Tensor& lengths, int64_t first) {
  const int64_t t = routing.index.size(0);
  KRAIT_CHECK(lengths.ndim() == 1 && lengths.dtype() == DType::i32 && lengths.numel() > 0 && t % lengths.numel() == 0,
              "moe_counted: lengths are {}, expected i32 (b) of {} tokens of b sequences", describe(lengths), t);
  MoeCounted out{empty({t}, routing.weight.dtype(), routing.weight.device()),
                 empty(routing.counts.shape(), DType::i32, routing.counts.device())};
  if (t == 0) zero_(out.counts);
  else KRAIT_DISPATCH(routing.index.device(), moe_counted(out.mask, out.counts, routing.index, lengths.contiguous(), first));
  return out;
}

Tensor moe_route_backward(const Tensor& dweight, const Tensor& logits, const MoeRouting& routing,
                          const MoeOptions& options, const MoePenalties& penalties) {
  if (dweight.defined()) {
    check_same("moe_route", dweight, logits);
    KRAIT_CHECK(dweight.shape() == routing.index.shape(), "moe_route: dweight is {}, expected {}", dweight.shape(),
                routing.index.shape());
  }
  Tensor dlogits = empty(logits.shape(), logits.dtype(), logits.device());
  if (logits.numel() == 0) return dlogits;
  MoePenalties batch = penalties;
  if (!batch.counts.defined()) batch.counts = routing.counts;
  KRAIT_CHECK(batch.counts.shape() == routing.counts.shape() && batch.counts.dtype() == DType::i32,
              "moe_route: the batch's counts are {}, expected i32 {}", describe(batch.counts), routing.counts.shape());
  KRAIT_CHECK(!batch.mask.defined() || (batch.mask.shape() == Shape{logits.size(0)} && batch.mask.dtype() == logits.dtype()),
              "moe_route: the mask is {}, expected {} ({})", describe(batch.mask), logits.dtype(), logits.size(0));
  KRAIT_DISPATCH(logits.device(), moe_route_backward(dlogits, dweight.defined() ? dweight.contiguous() : Tensor(),
                                                     logits.contiguous(), routing, options, batch));
  return dlogits;
}

namespace {

void check_experts(const Tensor& x, const Tensor& weight, const Tensor& gate_up, const Tensor& down,
                   const MoeRouting& routing) {
  check_same("moe_experts", x, gate_up, down);
  const int64_t e = routing.groups.groups();
  KRAIT_CHECK(x.ndim() == 2 && x.size(0) == routing.index.size(0),
              "moe_experts: x is {}, expected ({}, width)", x.shape(), routing.index.size(0));
  KRAIT_CHECK(down.ndim() == 3 && down.size(0) == e && down.size(1) == x.size(1) &&
                  gate_up.shape() == Shape({2 * e, down.size(2), x.size(1)}),
              "moe_experts: gate_up is {} and down {} for {} experts on {}; expected (2 e, f, m) and (e, m, f)",
              gate_up.shape(), down.shape(), e, x.shape());
  KRAIT_CHECK(weight.shape() == routing.index.shape() && weight.dtype() == accum_dtype(x.dtype()),
              "moe_experts: weights are {}, expected {} {}", describe(weight), name_of(accum_dtype(x.dtype())).data(),
              routing.index.shape());
}

}  // namespace

MoeOut moe_experts_forward(const Tensor& x, const Tensor& weight, const Tensor& gate_up, const Tensor& down,
                           const MoeRouting& routing) {
  check_experts(x, weight, gate_up, down, routing);
  MoeOut out{empty(x.shape(), x.dtype(), x.device()), grouped_matmul(x, Gather::yes, gate_up, routing.groups)};
  if (x.numel() == 0) return out;
  const Tensor rows =
      grouped_matmul(glu_packed_forward(out.hidden, Activation::silu), Gather::no, down, routing.groups);
  KRAIT_DISPATCH(x.device(), moe_combine(out.y, rows, routing.position, weight.contiguous()));
  return out;
}

MoeGrad moe_experts_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& gate_up,
                             const Tensor& down, const Tensor& hidden, const MoeRouting& routing,
                             const Tensor& dgate_up_into, const Tensor& ddown_into) {
  check_experts(x, weight, gate_up, down, routing);
  check_same("moe_experts", x, dy, hidden);
  const Device device = x.device();
  const DType sums = accum_dtype(x.dtype());
  const RowGroups& groups = routing.groups;
  MoeGrad grad{empty(x.shape(), x.dtype(), device), zeros(weight.shape(), sums, device), {}, {}};
  const Tensor dout = dy.contiguous();
  const Tensor dh = grouped_matmul_input(dout, Gather::yes, down, groups);
  Tensor dhidden = empty(hidden.shape(), hidden.dtype(), device), weighted = empty(dh.shape(), dh.dtype(), device);
  if (x.numel() > 0)
    KRAIT_DISPATCH(device, moe_hidden_backward(dhidden, weighted, grad.dweight, dh, hidden, weight.contiguous(), groups));
  const auto weight_gradient = [&](const Tensor& into, const Tensor& w, Tensor& fresh, auto... operands) {
    Tensor dw = into.defined() ? into : empty(w.shape(), sums, device);
    grouped_matmul_weight(dw, into.defined(), operands..., groups);
    if (!into.defined()) fresh = dw;
  };
  weight_gradient(ddown_into, down, grad.ddown, dout, Gather::yes, weighted, Gather::no);
  weight_gradient(dgate_up_into, gate_up, grad.dgate_up, dhidden, Gather::no, x.contiguous(), Gather::yes);
  const Tensor rows = grouped_matmul_input(dhidden, Gather::no, gate_up, groups);
  if (x.numel() > 0) KRAIT_DISPATCH(device, moe_combine(grad.dx, rows, routing.position, Tensor()));
  return grad;
}

}  // namespace krait::kernels

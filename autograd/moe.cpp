#include "autograd/moe.h"

#include "autograd/elementwise.h"
#include "autograd/reduce.h"
#include "autograd/shape.h"
#include "autograd/softmax.h"
#include "core/comm/collectives.h"
#include "kernels/elementwise.h"
#include "kernels/reduce.h"

namespace krait::autograd {

namespace {

// Slots that chose each, for null ones the mean over all of them.
Variable chosen(const Tensor& counts, int64_t experts, DType dtype) {
  const Variable f(counts.to(dtype));
  const int64_t n = counts.numel();
  return n == experts ? f : concat({slice(f, 0, 0, experts), expand(mean(slice(f, 0, experts, n), 0, keepdim), {n - experts})}, 0);
}

// Of a batch with these counts the logits' share.
Tensor penalty_of(const Tensor& logits, const MoeRouting& routing, const MoeOptions& options, const MoePenalties& p) {
  const NoGrad guard;
  const auto n = static_cast<double>(logits.size(1)), k = static_cast<double>(routing.index.size(1));
  const Variable f = chosen(p.counts, options.experts, logits.dtype()), tokens = sum(Variable(p.counts.to(logits.dtype()))) / k;
  const auto counted = [&](const Variable& v) { return p.mask.defined() ? v * Variable(p.mask.view({-1, 1})) : v; };
  const Variable balance = sum(sum(counted(softmax(Variable(logits))), 0) * f) * (n / k) / (tokens * tokens);
  const Variable router_z = sum(counted(square(Variable(routing.lse.view({-1, 1}))))) / tokens;
  return (balance * p.balance + router_z * p.router_z).data();
}

}  // namespace

MoeRoute moe_route(const Variable& logits, const MoeOptions& options, const MoePenalties& penalties) {
  return moe_route(logits, options, penalties, *comm::single_group("batch"));
}

MoeRoute moe_route(const Variable& logits, const MoeOptions& options, const MoePenalties& of_batch,
                   comm::ProcessGroup& group, const Tensor& lengths) {
  const MoeRouting routing = kernels::moe_route(logits.data(), options);
  MoePenalties penalties = of_batch;
  Tensor penalty;
  if (penalties.balance != 0 || penalties.router_z != 0) {
    Tensor counts = routing.counts;
    if (lengths.defined() && logits.size(0) > 0) {
      const kernels::MoeCounted counted = kernels::moe_counted(routing, lengths, group.rank() * logits.size(0) / lengths.numel());
      penalties.mask = counted.mask;
      counts = counted.counts;
    }
    penalties.counts = comm::all_reduce(counts, group);
    if (logits.size(0) > 0) penalty = penalty_of(logits.data(), routing, options, penalties);
  }
  const Variable weight = record("moe_route", {logits}, routing.weight,
                                 [logits = logits.data(), routing, options, penalties](const Tensor& dweight) -> Grads {
                                   return {kernels::moe_route_backward(dweight, logits, routing, options, penalties)};
                                 });
  return {weight, routing, penalty};
}

MoeLosses moe_losses(const Variable& logits, const MoeRouting& routing, const MoeOptions& options) {
  const double scale = static_cast<double>(logits.size(1)) / static_cast<double>(routing.index.numel());
  const Variable f = chosen(routing.counts, options.experts, logits.dtype());
  return {sum(mean(softmax(logits), 0) * f) * scale, mean(square(logsumexp(logits, -1)))};
}

Variable moe_experts(const Variable& x, const MoeRoute& route, const Variable& gate_up, const Variable& down) {
  const auto [y, hidden] = kernels::moe_experts_forward(x.data(), route.weight.data(), gate_up.data(), down.data(),
                                                        route.routing);
  return record("moe_experts", {x, route.weight, gate_up, down}, y,
                [x = x.data(), weight = route.weight.data(), gate_up, down, hidden = hidden,
                 routing = route.routing](const Tensor& dy) -> Grads {
                  const auto buffer = [&](const Variable& v) {
                    const bool fits = v.accumulates_in_place() && v.grad().dtype() == accum_dtype(x.dtype());
                    return fits ? v.grad() : Tensor();
                  };
                  auto g = kernels::moe_experts_backward(dy, x, weight, gate_up.data(), down.data(), hidden, routing,
                                                         buffer(gate_up), buffer(down));
                  const auto like = [](const Tensor& d, const Variable& v) { return d.defined() ? d.to(v.dtype()) : d; };
                  return {g.dx, g.dweight, like(g.dgate_up, gate_up), like(g.ddown, down)};
                });
}

}  // namespace krait::autograd

#include "autograd/moe.h"

#include "autograd/elementwise.h"
#include "autograd/reduce.h"
#include "autograd/shape.h"
#include "autograd/softmax.h"
#include "core/comm/collectives.h"
#include "kernels/elementwise.h"
#include "kernels/reduce.h"

namespace krait::autograd {

MoeRoute moe_route(const Variable& logits, const MoeOptions& options, const MoePenalties& penalties) {
  return moe_route(logits, options, penalties, *comm::single_group("batch"));
}

MoeRoute moe_route(const Variable& logits, const MoeOptions& options, const MoePenalties& of_batch,
                   comm::ProcessGroup& group) {
  const MoeRouting routing = kernels::moe_route(logits.data(), options);
  MoePenalties penalties = of_batch;
  if (penalties.balance != 0 || penalties.router_z != 0) {
    penalties.counts = comm::all_reduce(routing.counts, group);
    penalties.tokens = group.size() * logits.size(0);
  }
  const Variable weight = record("moe_route", {logits}, routing.weight,
                                 [logits = logits.data(), routing, options, penalties](const Tensor& dweight) -> Grads {
                                   return {kernels::moe_route_backward(dweight, logits, routing, options, penalties)};
                                 });
  return {weight, routing};
}

MoeLosses moe_losses(const Variable& logits, const MoeRouting& routing, const MoeOptions& options) {
  const int64_t n = logits.size(1), e = options.experts;
  const double scale = static_cast<double>(n) / static_cast<double>(routing.index.numel());
  Variable f(routing.counts.to(logits.dtype()));
  if (n > e) f = concat({slice(f, 0, 0, e), expand(mean(slice(f, 0, e, n), 0, keepdim), {n - e})}, 0);
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

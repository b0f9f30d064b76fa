#pragma once
#include "autograd/variable.h"
#include "core/comm/process_group.h"
#include "kernels/moe.h"

namespace krait {
inline namespace autograd {

using kernels::MoeOptions;
using kernels::MoePenalties;
using kernels::MoeRouting;

/// Routing by logits (t, n) fp32 (fp64), see kernels/moe.h. Gradients flow through `weight` (t, k); `penalties` add the
/// gradient of the auxiliary losses to the logits' whenever weight has a gradient, without a loss of their own in the
/// sum (so that a block computed again in backward needs no second output).
struct MoeRoute {
  Variable weight;
  MoeRouting routing;
  Tensor penalty = {};  // what they add to the loss, of a group this member's share, a scalar; undefined without any
};
MoeRoute moe_route(const Variable& logits, const MoeOptions& options, const MoePenalties& penalties = {});
/// The same where each member of a group routes its part, of the same size, of one batch. Of the sequences of padded rows,
/// lengths (b) int32, only that many positions count in the auxiliary losses; t is then b l, positions [rank l, rank l + l)
/// of each.
MoeRoute moe_route(const Variable& logits, const MoeOptions& options, const MoePenalties& penalties,
                   comm::ProcessGroup& group, const Tensor& lengths = {});

/// Values of the auxiliary losses (scalars, differentiable through the logits).
struct MoeLosses { Variable balance, router_z; };
MoeLosses moe_losses(const Variable& logits, const MoeRouting& routing, const MoeOptions& options);

/// The weighted sum of the chosen experts' outputs, x (t, m) to the same shape. gate_up (2 e, f, m), down (e, m, f).
Variable moe_experts(const Variable& x, const MoeRoute& route, const Variable& gate_up, const Variable& down);

}  // namespace autograd
}  // namespace krait

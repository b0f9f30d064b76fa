#pragma once
#include "kernels/grouped_matmul.h"

namespace krait {
namespace kernels {

/// Routing of t tokens to their k best of n slots: `experts` real ones, then null experts that do nothing (Shazeer et
/// al. 2017; null experts: Zeng et al. 2024). With p = softmax(logits) and S the real slots among the k best:
///   w_e = p_e, or p_e / sum_S p with renormalize (nothing in S: no weight at all)         y = sum_S w_e expert_e(x)
/// Equal logits: the lower slot wins. No token is dropped.
struct MoeOptions {
  int64_t experts = 8, top_k = 2;
  bool renormalize = true;
};
struct MoeRouting {
  Tensor index;     // (t, k) int32: slots, best first
  Tensor weight;    // (t, k) like logits; 0 for null slots
  Tensor lse;       // (t) log sum exp of the logits, like logits
  Tensor counts;    // (n) int32: tokens that chose each slot
  Tensor position;  // (t, k) int32: row of the choice among the experts' rows; -1 for null slots
  RowGroups groups; // rows by expert, tokens in order: row i is choice order[i] of the t k, token order[i] / k
};
/// logits (t, n) fp32 or fp64, n >= experts, k <= n.
MoeRouting moe_route(const Tensor& logits, const MoeOptions& options);

/// The routing to slots [first, first + experts) alone: groups, order and position count these experts' rows from 0, the
/// choices of others have position -1. index, weight, lse and counts stay those of the whole.
MoeRouting moe_part(const MoeRouting& whole, int64_t first, int64_t experts);

/// Weights of the two auxiliary losses whose gradient is added to the logits' (a loss's gradient times the weight):
///   balance   n sum_e f_e mean_t p_te, f_e = counts_e / (t k), for a null slot the mean over all null slots: 1 when
///             uniform, f held constant (Fedus et al. 2022)
///   router_z  mean_t lse_t^2 (Zoph et al. 2022)
/// Where ranks route parts of one batch, the batch is all of theirs: counts is the sum over the ranks. t, the tokens that
/// count, is sum_e counts_e / k: on a GPU a captured step learns it anew from each batch.
struct MoePenalties {
  double balance = 0, router_z = 0;
  Tensor counts = {};  // (n) int32; undefined: those of the routing
  Tensor mask = {};    // (t) like logits, 1 or 0: the tokens that count; undefined: all
};
/// The tokens that count where t = b l positions of b sequences are routed, from position `first` of each on, of which the
/// first lengths (b) int32 are not padding: the two fields of MoePenalties.
struct MoeCounted { Tensor mask, counts; };
MoeCounted moe_counted(const MoeRouting& routing, const Tensor& lengths, int64_t first);
/// dlogits from dweight (t, k), or undefined: 0. With D = sum_S w dw:
///   renormalize: w_e (dw_e - D) on S          else: p_e (dw_e [e in S] - D)
Tensor moe_route_backward(const Tensor& dweight, const Tensor& logits, const MoeRouting& routing,
                          const MoeOptions& options, const MoePenalties& penalties);

/// SwiGLU experts: gate_up (2 e, f, m) = all gates, then all ups; down (e, m, f); x (t, m), weight (t, k) fp32 (fp64):
///   y_t = sum_k weight_tk down_e (silu(gate_e x_t) * up_e x_t), in fp32 (fp64)
/// hidden (t k, 2 f): what gates and ups made, by the experts' rows; the backward needs it.
struct MoeOut { Tensor y, hidden; };
MoeOut moe_experts_forward(const Tensor& x, const Tensor& weight, const Tensor& gate_up, const Tensor& down,
                           const MoeRouting& routing);
/// dgate_up and ddown in fp32 (fp64), or added to the *_into buffers of that dtype where given (then undefined).
struct MoeGrad { Tensor dx, dweight, dgate_up, ddown; };
MoeGrad moe_experts_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& gate_up,
                             const Tensor& down, const Tensor& hidden, const MoeRouting& routing,
                             const Tensor& dgate_up_into = {}, const Tensor& ddown_into = {});

// Backends; contiguous, nothing is empty.
// moe_combine: y_t = sum over k of weight_tk rows[position_tk], null choices left out; weight undefined: 1.
// moe_hidden_backward, on row i = choice c with g, u its hidden and h = silu(g) u, dh the gradient of h before the
// choice's weight: dhidden = weight_c dh h', weighted = weight_c h, dweight_c = dh . h. dweight is 0 elsewhere already.
KRAIT_BACKENDS(void moe_route(MoeRouting& routing, const Tensor& logits, const MoeOptions& options);
               void moe_part(MoeRouting& part, const MoeRouting& whole, int64_t first);
               void moe_counted(Tensor& mask, Tensor& counts, const Tensor& index, const Tensor& lengths, int64_t first);
               void moe_route_backward(Tensor& dlogits, const Tensor& dweight, const Tensor& logits,
                                       const MoeRouting& routing, const MoeOptions& options,
                                       const MoePenalties& penalties);
               void moe_combine(Tensor& y, const Tensor& rows, const Tensor& position, const Tensor& weight);
               void moe_hidden_backward(Tensor& dhidden, Tensor& weighted, Tensor& dweight, const Tensor& dh,
                                        const Tensor& hidden, const Tensor& weight, const RowGroups& groups))

}  // namespace kernels
}  // namespace krait

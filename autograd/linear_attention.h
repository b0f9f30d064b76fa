#pragma once
#include "autograd/state_passing.h"
#include "autograd/variable.h"

namespace krait {
inline namespace autograd {

/// Linear attention (Katharopoulos et al. 2020), with a scalar log decay g_t <= 0 per head where one is given:
///   elu1       S_t = e^{g_t} S_{t-1} + v_t (x) phi(k_t)    z_t = e^{g_t} z_{t-1} + phi(k_t)    phi = elu + 1
///              y_t = S_t phi(q_t) / (z_t . phi(q_t) + eps)
///   identity   S_t = e^{g_t} S_{t-1} + v_t (x) k_t         y_t = S_t q_t / sqrt(dk)
/// Computed in chunks as a state-space recurrence (kernels/ssd.h); z is one more row of the state, whose value is 1.
enum class FeatureMap : uint8_t { elu1, identity };
struct LinearAttentionOptions {
  FeatureMap feature = FeatureMap::elu1;
  double eps = 1e-6;
  int64_t chunk = 64;
  Tensor segments = {};  // (b, l) int32: the state starts anew where it changes
  SequencePieces pieces = {};  // as in autograd/ssd.h
};

/// y (b, l, h, dv) like v; state (b, h, rows, dk) in fp32 (fp64), rows = dv, or dv + 1 with z last for elu1.
struct LinearAttentionOut { Variable y, state; };

/// q, k (b, l, h, dk), v (b, l, h, dv); log decay g (b, l, h) fp32 (fp64) or undefined: 0; state before the first
/// position or undefined: 0. Gradients flow through both states.
LinearAttentionOut linear_attention(const Variable& q, const Variable& k, const Variable& v, const Variable& g,
                                    const Variable& initial_state, const LinearAttentionOptions& options = {});

/// One position without gradients: q, k (b, h, dk), v (b, h, dv), g (b, h); the state advances in place.
Tensor linear_attention_step(Tensor& state, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                             const LinearAttentionOptions& options = {});

/// Rows of the state for values of width dv.
inline int64_t linear_attention_rows(FeatureMap feature, int64_t dv) { return feature == FeatureMap::elu1 ? dv + 1 : dv; }

}  // namespace autograd
}  // namespace krait

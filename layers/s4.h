#pragma once
#include "autograd/s4_scan.h"
#include "kernels/s4_scan.h"
#include "layers/layer_context.h"
#include "layers/mixer.h"
#include "layers/registry.h"
#include "layers/s4_config.h"
#include "layers/tensor_split.h"

namespace krait::layers {

/// Structured state spaces: S4 (Gu, Goel & Re 2022), S4D (Gu et al. 2022) and their dense control. Each channel u of x
/// drives its own linear system, discretised with its own time step dt = e^log_dt:
///   x' = A x + B u    y = C x + D u      A: diag(-e^log_A_re + i A_im) - P P^* (s4), without P (s4d), dense (random)
/// as a convolution, y = K * u + D u with K_l = C A_bar^l B_bar (with K1 from the right too: bidirectional). Then
///   out = W dropout(gelu(y)) + b, halved by a gate: out_1 sigmoid(out_2)  (final_act: glu).
/// S4 trains C_tilde = C (I - A_bar^L), L the model's context: its kernel exists for that length, shorter ones are its
/// first entries; longer ones (evaluation only) double C_tilde.
/// With a tensor group each member has a share of the channels, and their sets of A, P and B; where there are fewer sets
/// than members, several hold copies of one. W's products are summed.
/// The state is x (b, copies h, states): constant size. With one, the layer runs as a recurrence; only the diagonal
/// form trains so. The discretised system is made at the state's first use without gradients, and kept in it.
class S4 final : public Mixer {
 public:
  S4(const S4Config& config, const LayerContext& context);

  Variable forward(const Variable& x, const SequenceInfo& info, LayerState* state) override;
  Tensor step(const Tensor& x, LayerState& state) override;
  LayerState initial_state(int64_t batch, int64_t max_length, DType dtype, Device device) const override;
  std::string prefix() const override { return ""; }
  double extra_flops_per_token(int64_t context) const override;
  std::string kernel_name(int64_t batch, int64_t context, DType dtype, Device device,
                          bool has_segments) const override;

 private:
  /// The parameters of a kernel. dense: A (s, N, N), B (s, N), C (c h, N); else n complex states. C is C_tilde in
  /// the DPLR form.
  struct System {
    Parameter log_dt, log_A_re, A_im, P, A, B, C;
    std::shared_ptr<std::map<std::string, Tensor>> first_values;  // of the others, from which C_tilde begins
  };
  int64_t channels() const { return h_ * tensor_->size(); }  // of all members
  Shard of_copies(int64_t dim) const;
  Variable shared(const Parameter& set) const;
  Variable dropped(const Variable& y) const;
  System make_system(const std::string& name, const System* shared);
  /// Those of some channels, C for each copy.
  struct Values {
    Variable log_dt, log_A_re, A_im, P, A, B;
    Vars C;
  };
  Values values(const System& system, int64_t first, int64_t end) const;
  Variable kernel(const System& system, int64_t length, int64_t first, int64_t end) const;
  Variable kernel_of_copy(const Values& s, const Variable& C, int64_t length) const;
  Variable convolution(const Variable& x, int64_t first, int64_t end, const Tensor& segments) const;
  Variable over_ranks(const Variable& x, const SequenceInfo& info, LayerState* state) const;
  Variable scan(const Variable& x, int64_t first, int64_t end, const Tensor& segments, Tensor& carried) const;
  Variable repeated(const Variable& x) const;
  Variable without_padding(const Variable& x, const Tensor& lengths) const;
  Variable recurrent(const Variable& u, const Tensor& segments, LayerState& state) const;
  void check_recurrent() const;
  DiscreteSystem discretised(const Values& values) const;
  kernels::S4System system_of(LayerState& state) const;
  Variable output(const Variable& y) const;
  Variable mixed(const Variable& activated) const;

  S4Config config_;
  comm::GroupPtr sequence_, tensor_;
  Owned own_, sets_;       // channels; sets of states
  int64_t h_, n_, l_max_;  // channels here; stored states of each; L of C_tilde
  std::string stream_;     // of the random numbers of dropout
  System forward_, reverse_;
  Parameter D_, out_weight_, out_bias_;
};

/// The layer kinds `s4` and `s4d`.
LayerKind s4_kind();
LayerKind s4d_kind();

}  // namespace krait::layers

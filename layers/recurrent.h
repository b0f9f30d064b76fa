#pragma once
#include "kernels/recurrent.h"
#include "layers/layer_context.h"
#include "layers/linear.h"
#include "layers/mixer.h"
#include "layers/recurrent_config.h"
#include "layers/registry.h"

namespace krait::layers {

/// The classical recurrent networks, one layer each, without and with gates (RNN: Elman 1990; LSTM: Hochreiter &
/// Schmidhuber 1997; GRU: Cho et al. 2014, reset after the product). With g gates,
///   a = W_ih x + b_ih        h_t = cell(a_t, W_hh h_{t-1} + b_hh)        (RnnCell, LstmCell, GruCell)
///   y = h, or W_out h where the hidden width is not d_model
/// The hidden width is not split over a tensor group: W_hh is dense, so members would have to gather h at every position,
/// one after the other. Every member computes all. (sLSTM's recurrence stays within heads, which split.)
/// State: h, for the LSTM also c, in fp32.
class Recurrent final : public Mixer {
 public:
  Recurrent(kernels::RecurrentCell cell, const RecurrentConfig& config, const LayerContext& context);

  Variable forward(const Variable& x, const SequenceInfo& info, LayerState* state) override;
  Tensor step(const Tensor& x, LayerState& state) override;
  LayerState initial_state(int64_t batch, int64_t max_length, DType dtype, Device device) const override;
  double extra_flops_per_token(int64_t) const override { return 0; }
  std::string kernel_name(int64_t batch, int64_t context, DType dtype, Device device,
                          bool has_segments) const override;

 private:
  Variable over_ranks(const Variable& x, const SequenceInfo& info, Tensor& carried) const;
  kernels::RecurrentCell cell_;
  int64_t hidden_;
  comm::GroupPtr sequence_;
  int64_t copies_;  // members of the tensor group, each with all of the layer
  Parameter w_ih_, w_hh_, b_ih_, b_hh_;
  std::shared_ptr<Linear> out_;
};

/// The layer kinds `rnn`, `lstm` and `gru`.
LayerKind rnn_kind();
LayerKind lstm_kind();
LayerKind gru_kind();

}  // namespace krait::layers

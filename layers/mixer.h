#pragma once
#include <map>
#include <string>

#include "layers/mlp.h"

namespace krait::layers {

/// What a layer must know of the sequences it works on, beyond their values. Built once per batch.
struct SequenceInfo {
  /// (b, l) int32: the document that each position belongs to, ascending inside a row. Undefined: one document.
  /// State, attention, convolution and positions reset where it changes.
  Tensor segments;
  /// (b, l) int32: position inside the document. Undefined: 0, 1, ... after what the state has consumed.
  Tensor positions;
  /// (b) int32: positions of the whole sequence that count; the rest is padding, which no earlier position may see.
  /// Undefined: all.
  Tensor lengths = {};
};

/// State of one layer between calls: named tensors of constant size (recurrent state, convolution tail, key/value
/// cache). Values only: gradients do not flow through it.
struct LayerState {
  std::map<std::string, Tensor> tensors;
  int64_t length = 0;  // positions consumed so far
};

/// What mixes along the sequence: attention, state-space models, recurrent nets.
class Mixer : public Module {
 public:
  /// Parallel (training) form: x (b, l, d) to the same shape. With a state, continues from it and leaves the
  /// final state in it; without, starts from the initial state and drops the final one.
  virtual Variable forward(const Variable& x, const SequenceInfo& info, LayerState* state) = 0;
  /// Recurrent (inference) form: one position, x (b, 1, d) to the same shape, advancing the state. No gradient.
  virtual Tensor step(const Tensor& x, LayerState& state) = 0;
  /// State before the first position. max_length bounds key/value caches.
  virtual LayerState initial_state(int64_t batch, int64_t max_length, DType dtype, Device device) const = 0;
  /// Turns a state into one that step() alone advances from here on, in which it is written once in several positions and
  /// kept in `dtype` (fp32 or bf16). False, and nothing happens, where that is not served.
  virtual bool keep_recent_positions(LayerState& /*state*/, DType /*dtype*/) const { return false; }
  /// Whether streams of any length can carry the state on: its size does not grow, all its tensors are zero at the
  /// start and have the batch as their first dimension, so that a row starts anew by zeros.
  virtual bool carries_state() const { return true; }
  /// Name of the norm in front of it in public checkpoints.
  virtual std::string norm_name() const { return "norm"; }
  /// The feed-forward part that belongs to the layer itself; a block without an mlp of the model's takes it as its
  /// second branch, behind a norm named ffn_norm. Null: none.
  virtual std::shared_ptr<FeedForward> own_feed_forward(const LayerContext&) const { return nullptr; }
  /// Prefix of its parameters inside the block; empty: the block's own names.
  virtual std::string prefix() const { return "mixer"; }
  /// FLOPs per token of a forward pass that are not products with matrix parameters (attention scores, scans),
  /// at this context, causal part only.
  virtual double extra_flops_per_token(int64_t context) const = 0;
  /// Which implementation will serve it, for the line printed at the start of a run.
  virtual std::string kernel_name(int64_t batch, int64_t context, DType dtype, Device device,
                                  bool has_segments) const = 0;
};

}  // namespace krait::layers

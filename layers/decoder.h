#pragma once
#include <string>
#include <vector>

#include "layers/block.h"
#include "layers/model_config.h"

namespace krait::layers {

/// State of a whole stack, for streaming evaluation and generation.
struct DecoderState {
  std::vector<LayerState> layers;
  int64_t length = 0;  // positions consumed so far
  /// (b, 1) int32 on the device: where single positions stand, in place of `length`, so that a captured step serves
  /// every position. Undefined outside captured loops.
  Tensor positions;
};

/// A stack of residual blocks with any pattern of mixers, and a final norm where the blocks are pre-norm.
class Decoder final : public Module {
 public:
  Decoder(const ModelConfig& config, int64_t context, const Parallel& parallel = {});

  /// x (b, l, d) to the normalised residual stream (b, l, d).
  Variable forward(const Variable& x, const SequenceInfo& info, DecoderState* state);
  DecoderState initial_state(int64_t batch, int64_t max_length, DType dtype, Device device) const;
  /// See Mixer; whether any layer's state was turned.
  bool keep_recent_positions(DecoderState& state, DType dtype) const;
  double extra_flops_per_token(int64_t context) const;
  /// The first layer kind that cannot carry its state through a stream of any length; empty when all can.
  std::string kind_without_stream() const;
  /// One line per layer kind: which kernel will serve it.
  std::vector<std::string> kernel_lines(int64_t batch, int64_t context, DType dtype, Device device,
                                        bool has_segments) const;
  /// Keep only each block's input and run the block again in backward.
  void set_recompute(bool on) { recompute_ = on; }
  /// See FeedForward.
  void set_auxiliary_scale(double scale);
  Tensor auxiliary_loss() const;

 private:
  std::vector<std::shared_ptr<Block>> blocks_;
  std::vector<std::string> kinds_;  // of the blocks
  std::shared_ptr<Norm> norm_f_;  // null with post-norm blocks
  bool recompute_ = false;
  comm::GroupPtr sequence_;
};

}  // namespace krait::layers

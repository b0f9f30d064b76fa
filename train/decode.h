#pragma once
#include <memory>

#include "core/allocator.h"
#include "core/stream.h"
#include "kernels/sample.h"
#include "layers/model.h"

namespace krait::train {

/// Tokens one after another, for a batch of sequences of one length: the prompt through the parallel form, then single
/// steps whose drawn tokens stay on the device. On a GPU a step is one CUDA graph: states at fixed addresses, positions
/// and random numbers counted on the device.
class DecodeLoop {
 public:
  /// max_length bounds prompt and new tokens together, max_new those that drawn() holds. states: what those of Mamba-2 and
  /// mLSTM are kept in between steps; bf16 (on GPUs) halves what many sequences read. ids: tokens from there on are not drawn; 0: all are.
  DecodeLoop(layers::LanguageModel& model, const layers::StoreOptions& store, int64_t batch, int64_t max_length,
             int64_t max_new, const kernels::SampleOptions& sampling, bool graphs = true, DType states = DType::f32,
             int64_t ids = 0);
  ~DecodeLoop();

  /// Consumes the prompts (b, l) and draws the first new token. Once, before the steps.
  void prefill(const Tensor& prompts);
  /// Feeds the last drawn tokens back and draws the next ones. Queued, not waited for.
  void step();
  /// The tokens drawn so far, (b, n) int64 on the CPU. Waits for the device.
  Tensor drawn() const;
  int64_t count() const { return count_; }
  bool captured() const { return graph_ != nullptr; }
  const layers::DecoderState& state() const { return state_; }

 private:
  void run_step();
  void keep(const layers::DecoderState& after);
  void draw(const Tensor& logits);

  layers::LanguageModel& model_;
  Device device_;
  kernels::SampleOptions sampling_;
  DType states_;
  bool graphs_;
  int64_t ids_;
  bool scans_ = true;             // every layer is Mamba's or Mamba-2's
  int64_t count_ = 0, plain_steps_ = 0;
  layers::DecoderState state_;
  Tensor tokens_, position_, step_, made_;  // (b, 1) int64; (b) int32; (1) int64; (b, max_new) int64
  MemoryPool pool_;                         // of everything inside the graph
  std::unique_ptr<CapturedGraph> graph_;
};

}  // namespace krait::train

#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "autograd/cross_entropy.h"
#include "layers/decoder.h"
#include "layers/parameter_store.h"

namespace krait::layers {

/// One micro-batch on the model's device.
struct ModelInput {
  Tensor tokens;   // (b, l) int32 or int64; undefined for continuous inputs
  Tensor inputs;   // (b, l, features) floating, instead of tokens
  Tensor targets;  // language model (b, l) int64, -100 ignored; classifier (b) int64; regressor (b, outputs)
  Tensor lengths;  // (b) int32: valid positions of padded sequences (SequenceInfo::lengths); undefined: all
  SequenceInfo info;
  DecoderState* state = nullptr;  // language model: continues from it and leaves the final state in it
};

/// The piece of a micro-batch of whole sequences (b, L) that a member of a group over which sequences lie works on: its
/// L / size() positions of all that belongs to positions. L must be a multiple of the group's size.
ModelInput slice_sequence(const ModelInput& whole, const comm::ProcessGroup& group);

/// Loss of a micro-batch. Sums and counts let micro-batches and ranks be put together exactly.
struct ModelLoss {
  Variable loss;    // scalar fp32 (fp64 in fp64): what backward() starts from; its seed must be 1
  Tensor loss_sum;  // scalar: sum over the counted targets, nats for a language model
  Tensor count;     // scalar: counted targets
  /// Scalar: what else training minimises (balance of experts, regularisation), weighted as in the gradient, so that the
  /// sum over a step's micro-batches and ranks is the step's. Undefined where there is nothing.
  Tensor auxiliary = {};
};

/// What the data decide.
struct ModelShape {
  int64_t vocab_size = 0;      // of the tokenizer; 0 for continuous inputs
  int64_t input_features = 0;  // of continuous inputs
  int64_t context = 0;         // training length
};

/// What a model becomes when the shapes of its parameters change between two steps.
struct Resized {
  ModelConfig config;                        // of the new model
  std::map<std::string, Tensor> parameters;  // fp64 CPU: every parameter of the new model by its public name
  std::vector<std::string> reset;            // whose optimizer state begins again at zero; the others keep theirs
};

/// A trainable model.
///
/// A model may change itself between steps, outside any captured graph. The trainer's part, before step s runs:
///   if (model.resize_due(s)) {
///     Resized r = model.resize(s, first micro-batch of the step, store);
///     build a new model from r.config (make_model, same ModelShape), a new ParameterStore, set_masters(store, r.parameters);
///     rebuild what depends on shapes (optimizer, captured graphs); copy optimizer state by public name except r.reset
///   }
///   model.before_step(s, first micro-batch of the step, store);
/// A checkpoint after n > 0 finished steps has the shapes of config_at_step(config, n - 1): load it into a model made
/// from that config; resize_due(n) then says whether the next step changes them.
class Model : public Module {
 public:
  /// The part of the batch's mean loss that this micro-batch contributes: loss_sum / target_count, where
  /// target_count (scalar fp32 on the device) counts the targets of the whole batch, over all micro-batches and
  /// ranks. Undefined: this micro-batch's own count. Where sequences lie over ranks, the losses and sums of the ranks
  /// add up to the micro-batch's, and so do the counts that it makes itself.
  virtual ModelLoss loss(const ModelInput& input, const Tensor& target_count) = 0;
  /// One answer per sequence, (b, outputs): class logits or predictions. A language model has none: an error.
  virtual Variable predict(const ModelInput& input);
  /// Model FLOPs of training one token: 6 per matrix parameter in a product and 3 times the extra forward FLOPs
  /// (attention counted causal). Recomputation is not counted.
  virtual double train_flops_per_token(int64_t context) const;
  virtual double extra_flops_per_token(int64_t context) const = 0;
  /// One line per layer kind: which kernel will serve it.
  virtual std::vector<std::string> kernel_lines(int64_t batch, int64_t context, DType dtype, Device device,
                                                bool has_segments) const = 0;
  /// Keep only each block's input and run the block again in backward.
  virtual void set_recompute(bool on);
  /// Factor of losses that layers add to the gradient themselves (see FeedForward).
  virtual void set_auxiliary_scale(double /*scale*/) {}
  /// A layer kind that cannot stream with a state of constant size; empty when all can.
  virtual std::string kind_without_stream() const = 0;

  /// Whether the model ever changes itself; the functions below matter only then.
  virtual bool adapts() const { return false; }
  /// Whether resize() or before_step() would change anything before the step runs. Asked before samples are brought to
  /// the device, for which every step would wait.
  virtual bool adapts_at(int64_t /*step*/) const { return adapts(); }
  /// Changes parameter values in place where the model wants to at this step; says what the log should tell of it.
  virtual std::string before_step(int64_t /*step*/, const ModelInput& /*samples*/, ParameterStore& /*store*/) {
    return {};
  }
  /// Whether this model must change its shapes before the step runs.
  virtual bool resize_due(int64_t /*step*/) const { return false; }
  virtual Resized resize(int64_t step, const ModelInput& samples, const ParameterStore& store);

 protected:
  /// Elements of embeddings that also serve as the head's matrix.
  virtual int64_t tied_head_parameters() const { return 0; }
};

/// A model around a stack of blocks.
class DecoderModel : public Model {
 public:
  virtual Decoder& decoder() const = 0;
  double extra_flops_per_token(int64_t context) const override { return decoder().extra_flops_per_token(context); }
  std::vector<std::string> kernel_lines(int64_t batch, int64_t context, DType dtype, Device device,
                                        bool has_segments) const override {
    return decoder().kernel_lines(batch, context, dtype, device, has_segments);
  }
  std::string kind_without_stream() const override { return decoder().kind_without_stream(); }
  void set_recompute(bool on) override { decoder().set_recompute(on); }
  void set_auxiliary_scale(double scale) override { decoder().set_auxiliary_scale(scale); }
};

/// Next-token prediction: embedding, decoder, head (tied or not). With a tensor group each member has a range of the
/// vocabulary's rows; the loss exchanges a few numbers of each token, and only logits() and what generates gather.
class LanguageModel final : public DecoderModel {
 public:
  LanguageModel(const ModelConfig& config, const ModelShape& shape, const CrossEntropyOptions& loss = {},
                const Parallel& parallel = {});
  ModelLoss loss(const ModelInput& input, const Tensor& target_count) override;
  Decoder& decoder() const override { return *decoder_; }
  int64_t vocab_size() const { return vocab_size_; }

  /// Negative log-likelihood of every target, (b, l) fp32 in nats, 0 where ignored.
  Tensor token_nll(const ModelInput& input);
  /// At the places `rows` (n) int64 of the flattened (b l) positions: the negative log-likelihood of `targets` (n)
  /// int64, fp32 in nats, and the likeliest token, int64; both (n). The head sees those positions alone.
  struct Answers {
    Tensor nll, likeliest;
  };
  Answers answers(const ModelInput& input, const Tensor& rows, const Tensor& targets);
  /// Logits of every position (b, l, vocab_size), capped, without the padded columns.
  Variable logits(const ModelInput& input);
  /// Consumes tokens (b, l) and returns the logits after the last one, (b, vocab_size).
  Tensor next_logits(const Tensor& tokens, DecoderState& state);
  DecoderState initial_state(int64_t batch, int64_t max_length, const StoreOptions& store) const;

 private:
  Variable hidden(const ModelInput& input);
  Variable capped(const Variable& logits) const;
  Variable embedded(const Tensor& tokens) const;
  kernels::VocabularyShard vocabulary() const;
  Variable whole_logits(const Variable& h) const;
  int64_t tied_head_parameters() const override { return tied_ ? embedding_.shape().numel() : 0; }
  const Variable& head() const { return tied_ ? embedding_.variable() : head_.variable(); }

  comm::GroupPtr group_;  // shares the vocabulary: embedding and head
  Owned rows_;            // of `padded_` rows
  int64_t padded_;
  CrossEntropyOptions loss_options_;
  int64_t vocab_size_ = 0, max_positions_ = 0;
  bool tied_ = false;
  double embedding_dropout_ = 0;
  comm::GroupPtr sequence_;
  Parameter embedding_, positions_, head_;
  std::shared_ptr<Decoder> decoder_;
};

/// One answer per sequence: embedding or linear encoder, decoder, pooled or last position, linear head.
/// Classifier: cross-entropy over classes. Regressor: mean squared error over the outputs.
class SequenceModel final : public DecoderModel {
 public:
  SequenceModel(const ModelConfig& config, const ModelShape& shape, const CrossEntropyOptions& loss = {},
                const Parallel& parallel = {});
  ModelLoss loss(const ModelInput& input, const Tensor& target_count) override;
  Decoder& decoder() const override { return *decoder_; }
  Variable predict(const ModelInput& input) override;

 private:
  CrossEntropyOptions loss_options_;
  double embedding_dropout_ = 0;
  bool regressor_ = false;
  bool pooled_ = false;
  comm::GroupPtr sequence_;
  Parameter embedding_;
  std::shared_ptr<Linear> encoder_, head_;
  std::shared_ptr<Decoder> decoder_;
};

/// The loss of one answer per sequence, y (b, outputs): cross-entropy against classes (b), or the mean squared error
/// against (b, outputs). `penalty` (a scalar, may be undefined) is added to the batch's mean loss and to nothing else, nor do
/// label smoothing and z-loss count in loss_sum.
ModelLoss answer_loss(const Variable& y, const Tensor& targets, bool regressor, const Tensor& target_count,
                      const CrossEntropyOptions& options, const Variable& penalty = {});

/// The model that a config describes. `loss`: label smoothing and z-loss of a language model or classifier.
std::unique_ptr<Model> make_model(const ModelConfig& config, const ModelShape& shape,
                                  const CrossEntropyOptions& loss = {}, const Parallel& parallel = {});
/// The config with the shapes that its schedules give the model at a step.
ModelConfig config_at_step(const ModelConfig& config, int64_t step);
/// Sets master (and compute) values by public name; every parameter must be there, whole.
void set_masters(ParameterStore& store, const std::map<std::string, Tensor>& values);

}  // namespace krait::layers

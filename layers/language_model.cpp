#include <algorithm>

#include "autograd/collective.h"
#include "autograd/dropout.h"
#include "autograd/elementwise.h"
#include "autograd/embedding.h"
#include "autograd/shape.h"
#include "core/comm/collectives.h"
#include "kernels/cross_entropy.h"
#include "kernels/embedding.h"
#include "kernels/reduce.h"
#include "kernels/step_embedding.h"
#include "layers/model.h"

namespace krait::layers {

LanguageModel::LanguageModel(const ModelConfig& config, const ModelShape& shape, const CrossEntropyOptions& loss,
                             const Parallel& parallel)
    : group_(parallel.tensor), rows_(owned_uneven(group_, config.padded_vocab(shape.vocab_size))),
      padded_(config.padded_vocab(shape.vocab_size)), loss_options_(loss), vocab_size_(shape.vocab_size), max_positions_(config.max_positions),
      tied_(config.tie_embeddings), embedding_dropout_(config.embedding_dropout),
      sequence_(parallel.sequence) {
  KRAIT_CHECK(vocab_size_ > 0, "a language model needs tokens, but the data have none; set model.type: classifier");
  const int64_t rows = padded_, d = config.d_model;
  KRAIT_CHECK(rows >= group_->size(), "a vocabulary of {} does not split over {} processes; lower parallelism.tensor",
              rows, group_->size());
  const Initializer init = normal(config.init_std);
  loss_options_.logit_cap = config.logit_cap;
  loss_options_.valid_vocab = rows == vocab_size_ ? 0 : vocab_size_;
  embedding_ = parameter("embedding.weight", {rows, d}, init, {.embedding = true}, rows_.rows());
  if (config.position == "learned")
    positions_ = parameter("position_embedding.weight", {max_positions_, d}, init, {.embedding = true});
  decoder_ = child<Decoder>("", config, shape.context, parallel);
  if (!tied_) head_ = parameter("lm_head.weight", {rows, d}, init, {}, rows_.rows());
  set_primary(group_->rank() == 0);
}

Variable LanguageModel::embedded(const Tensor& tokens) const {
  return reduce_from_group(embedding(embedding_, tokens, {rows_.begin, padded_}), group_);
}

kernels::VocabularyShard LanguageModel::vocabulary() const { return {group_, rows_.begin, padded_}; }

namespace {

// One token a sequence, nothing kept for a gradient: all that it needs of the tables are rows, which one kernel takes.
bool generates(const ModelInput& input) {
  return input.state && input.tokens.size(1) == 1 && input.tokens.dtype() == DType::i64 && !recording();
}

}  // namespace

Variable LanguageModel::hidden(const ModelInput& input) {
  const int64_t l = input.tokens.size(1), before = input.state ? input.state->length : 0;
  const int64_t offset = before + sequence_->rank() * l;
  const Tensor& places = input.info.positions;
  const bool placed = positions_.defined() && places.defined(), whole = group_->size() == 1;
  Variable x;
  if (whole && placed == positions_.defined() && generates(input)) {
    x = Variable(kernels::step_embedding(embedding_.variable().data(), input.tokens, placed ? positions_.variable().data() : Tensor(),
                                         placed ? places : Tensor()));
  } else {
    x = embedded(input.tokens);
    if (positions_.defined()) {
      KRAIT_CHECK(places.defined() || offset + l <= max_positions_,
                  "position {} is past the {} learned positions (model.max_positions); lower the context, or use "
                  "model.position: none with rope",
                  offset + l - 1, max_positions_);
      x = x + (places.defined() ? embedding(positions_, places) : slice(positions_, 0, offset, offset + l));
    }
  }
  x = dropout(x, training() ? embedding_dropout_ : 0.0, "embedding", DropoutPart::of(x, *sequence_));
  SequenceInfo info = input.info;
  info.lengths = input.lengths;
  return decoder_->forward(x, info, input.state);
}

ModelLoss LanguageModel::loss(const ModelInput& input, const Tensor& count) {
  const Variable h = hidden(input);
  Tensor target_count = count, own_count;
  if (!count.defined() && sequence_->size() > 1) {
    own_count = kernels::count_targets(input.targets.reshape({-1}), vocab_size_, loss_options_.ignore_index);
    target_count = comm::all_reduce(own_count, *sequence_);
  }
  const LossOut out = linear_cross_entropy(copy_to_group(reshape(h, {-1, h.size(-1)}), group_), head(),
                                           input.targets.reshape({-1}), loss_options_, 1.0, 0, target_count, vocabulary());
  return {out.loss, out.nll_sum, own_count.defined() ? own_count : out.count, decoder_->auxiliary_loss()};
}

Tensor LanguageModel::token_nll(const ModelInput& input) {
  const NoGrad guard;
  const Tensor h = hidden(input).data();
  return kernels::linear_cross_entropy_nll(h.flatten_leading(), head().data(), input.targets.reshape({-1}),
                                           loss_options_, 0, vocabulary())
      .view(input.targets.shape());
}

LanguageModel::Answers LanguageModel::answers(const ModelInput& input, const Tensor& rows, const Tensor& targets) {
  const NoGrad guard;
  const Tensor h = hidden(input).data();
  const Tensor wanted = kernels::embedding_forward(h.flatten_leading(), rows);  // (n, d)
  Answers out{kernels::linear_cross_entropy_nll(wanted, head().data(), targets, loss_options_, 0, vocabulary()),
              empty(rows.shape(), DType::i64, h.device())};
  const int64_t n = rows.size(0), chunk = std::max<int64_t>(1, (int64_t{1} << 26) / vocab_size_);
  for (int64_t begin = 0; begin < n; begin += chunk) {  // a chunk of logits at a time; a cap keeps their order
    const int64_t end = std::min(begin + chunk, n);
    const Tensor scores = whole_logits(Variable(wanted.slice(0, begin, end))).data().slice(-1, 0, vocab_size_);
    Tensor part = out.likeliest.slice(0, begin, end);
    copy_(part, kernels::argmax(scores, -1));
  }
  return out;
}

// h (..., d) -> (..., padded vocabulary). Shares of the vocabulary differ by one row at most: the smaller ones travel
// with a column of zeros.
Variable LanguageModel::whole_logits(const Variable& h) const {
  const Variable own = linear(copy_to_group(h, group_), head());
  const int64_t members = group_->size(), most = (padded_ + members - 1) / members;
  if (padded_ % members == 0) return gather_from_group(own, -1, group_);
  const Shape gap = own.shape().with(-1, most - rows_.count());
  const Variable even = gap[-1] == 0 ? own : concat({own, Variable(zeros(gap, own.dtype(), own.device()))}, -1);
  const Variable all = gather_from_group(even, -1, group_);
  Vars parts;
  for (int64_t r = 0; r < members; ++r) {
    const int64_t count = (r + 1) * padded_ / members - r * padded_ / members;
    parts.push_back(slice(all, -1, r * most, r * most + count));
  }
  return concat(parts, -1);
}

// The map that the loss's kernels apply themselves, in the precision of its sums.
Variable LanguageModel::capped(const Variable& logits) const {
  const double cap = loss_options_.logit_cap;
  if (cap == 0) return logits;
  return cast(cap * tanh(cast(logits, accum_dtype(logits.dtype())) / cap), logits.dtype());
}

Variable LanguageModel::logits(const ModelInput& input) {
  const Variable all = capped(whole_logits(hidden(input)));
  return all.size(-1) == vocab_size_ ? all : slice(all, -1, 0, vocab_size_);
}

Tensor LanguageModel::next_logits(const Tensor& tokens, DecoderState& state) {
  KRAIT_CHECK(sequence_->size() == 1, "generation needs whole sequences on a rank, but they lie over {}: set "
              "parallelism.sequence: 1", sequence_->size());
  const NoGrad guard;
  ModelInput input;
  input.tokens = tokens;
  input.state = &state;
  if (tokens.size(1) == 1) input.info.positions = state.positions;
  const Variable last(hidden(input).data().select(1, -1).contiguous());
  return capped(whole_logits(last)).data().slice(-1, 0, vocab_size_);
}

DecoderState LanguageModel::initial_state(int64_t batch, int64_t max_length, const StoreOptions& store) const {
  return decoder_->initial_state(batch, max_length, store.compute, store.device);
}

}  // namespace krait::layers

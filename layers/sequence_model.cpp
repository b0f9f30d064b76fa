#include <cmath>

#include "autograd/dropout.h"
#include "autograd/elementwise.h"
#include "autograd/embedding.h"
#include "autograd/reduce.h"
#include "autograd/sequence_pool.h"
#include "autograd/shape.h"
#include "kernels/elementwise.h"
#include "layers/model.h"

namespace krait::layers {

SequenceModel::SequenceModel(const ModelConfig& config, const ModelShape& shape, const CrossEntropyOptions& loss,
                             const Parallel& parallel)
    : loss_options_(loss), embedding_dropout_(config.embedding_dropout), regressor_(config.type == "regressor"),
      pooled_(config.head == "pooled"), sequence_(parallel.sequence) {
  const int64_t d = config.d_model;
  KRAIT_CHECK(config.n_classes > 0, "{}: model.n_classes is not set", config.type);
  if (shape.vocab_size > 0) {
    embedding_ = parameter("embedding.weight", {shape.vocab_size, d}, normal(config.init_std), {.embedding = true});
  } else {
    KRAIT_CHECK(shape.input_features > 0, "{}: the data have neither tokens nor features", config.type);
    encoder_ = child<Linear>("encoder", shape.input_features, d, true,
                             1.0 / std::sqrt(static_cast<double>(shape.input_features)));
  }
  decoder_ = child<Decoder>("", config, shape.context, parallel);
  head_ = child<Linear>("head", d, config.n_classes, true, config.init_std);
}

Variable SequenceModel::predict(const ModelInput& input) {
  Variable x;
  if (encoder_) {
    x = encoder_->forward(Variable(input.inputs.to(head_->dtype())));
  } else {
    x = embedding(embedding_, input.tokens);
    x = dropout(x, training() ? embedding_dropout_ : 0.0, "embedding", DropoutPart::of(x, *sequence_));
  }
  SequenceInfo info = input.info;
  info.lengths = input.lengths;
  const Variable h = decoder_->forward(x, info, nullptr);
  return head_->forward(sequence_pool(h, input.lengths, pooled_ ? Pool::mean : Pool::last, sequence_));
}

ModelLoss SequenceModel::loss(const ModelInput& input, const Tensor& target_count) {
  ModelLoss out = answer_loss(predict(input), input.targets, regressor_, target_count, loss_options_);
  out.auxiliary = decoder_->auxiliary_loss();
  if (sequence_->rank() == 0) return out;
  // Every rank of a sequence has the same answers: those of the first count.
  out.loss = out.loss * 0.0;
  for (Tensor* t : {&out.loss_sum, &out.count})
    if (t->defined()) *t = zeros_like(*t);
  return out;
}

ModelLoss answer_loss(const Variable& y, const Tensor& targets, bool regressor, const Tensor& target_count,
                      const CrossEntropyOptions& options, const Variable& penalty) {
  const DType wide = accum_dtype(y.dtype());
  ModelLoss out;
  Variable mean_loss;
  Tensor plain;  // without what is only trained on
  if (regressor) {
    KRAIT_CHECK(targets.shape() == y.shape(), "regressor: targets are {}, predictions {}", describe(targets), y.shape());
    out.count = full({}, static_cast<double>(y.size(0)), wide, y.device());
    const Variable error = cast(y, wide) - Variable(targets.to(wide));
    mean_loss = mean(error * error);
  } else {
    const Tensor kept = kernels::count_targets(targets, y.size(-1), options.ignore_index);
    mean_loss = cross_entropy(y, targets, options, kept);
    if (options.label_smoothing > 0 || options.z_loss > 0) plain = kernels::cross_entropy_forward(y.data(), targets, {}, kept).loss;
    out.count = kept.to(wide);
  }
  out.loss_sum = kernels::mul(plain.defined() ? plain : mean_loss.data(), out.count);
  const Variable whole = penalty.defined() ? mean_loss + penalty : mean_loss;
  out.loss = target_count.defined() ? whole * Variable(out.count) / Variable(target_count.to(wide)) : whole;
  return out;
}

}  // namespace krait::layers

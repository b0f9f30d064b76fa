#include <cmath>

#include "autograd/elementwise.h"
#include "autograd/embedding.h"
#include "autograd/reduce.h"
#include "autograd/sequence_pool.h"
#include "autograd/shape.h"
#include "kernels/elementwise.h"
#include "kernels/reduce.h"
#include "layers/model.h"

namespace krait::layers {

SequenceModel::SequenceModel(const ModelConfig& config, const ModelShape& shape)
    : regressor_(config.type == "regressor"), pooled_(config.head == "pooled") {
  const int64_t d = config.d_model;
  KRAIT_CHECK(config.n_classes > 0, "{}: model.n_classes is not set", config.type);
  if (shape.vocab_size > 0) {
    embedding_ = parameter("embedding.weight", {shape.vocab_size, d}, normal(config.init_std), {.embedding = true});
  } else {
    KRAIT_CHECK(shape.input_features > 0, "{}: the data have neither tokens nor features", config.type);
    encoder_ = child<Linear>("encoder", shape.input_features, d, true,
                             1.0 / std::sqrt(static_cast<double>(shape.input_features)));
  }
  decoder_ = child<Decoder>("", config, shape.context);
  head_ = child<Linear>("head", d, config.n_classes, true, config.init_std);
}

Variable SequenceModel::predict(const ModelInput& input) {
  const Variable x = encoder_ ? encoder_->forward(Variable(input.inputs.to(head_->dtype()))) : embedding(embedding_, input.tokens);
  const Variable h = decoder_->forward(x, input.info, nullptr);
  return head_->forward(sequence_pool(h, input.lengths, pooled_ ? Pool::mean : Pool::last));
}

ModelLoss SequenceModel::loss(const ModelInput& input, const Tensor& target_count) {
  const Variable y = predict(input);
  const DType wide = accum_dtype(y.dtype());
  ModelLoss out;
  Variable mean_loss;
  if (regressor_) {
    out.count = full({}, static_cast<double>(y.size(0)), wide, y.device());
    const Variable error = cast(y, wide) - Variable(input.targets.to(wide));
    mean_loss = mean(error * error);
  } else {
    out.count = kernels::count_targets(input.targets, 0, CrossEntropyOptions{}.ignore_index).to(wide);
    mean_loss = cross_entropy(y, input.targets, {});
    const Tensor hits = kernels::equal(kernels::argmax(y.data(), -1), input.targets.to(DType::i64));
    out.correct = kernels::sum(hits.to(wide));
  }
  out.loss_sum = kernels::mul(mean_loss.data(), out.count);
  out.loss = target_count.defined() ? mean_loss * Variable(out.count) / Variable(target_count.to(wide)) : mean_loss;
  return out;
}

}  // namespace krait::layers

#include "train/evaluate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "train/carried_state.h"
#include "train/clock.h"

namespace krait::train {

namespace {

// Bytes of text that each token stands for.
std::vector<int64_t> token_lengths(const data::Tokenizer& tokenizer) {
  std::vector<int64_t> lengths(static_cast<size_t>(tokenizer.vocab_size()));
  for (size_t i = 0; i < lengths.size(); ++i)
    lengths[i] = static_cast<int64_t>(tokenizer.token_bytes(static_cast<int32_t>(i)).size());
  return lengths;
}

data::DatasetPtr windows_of(const data::TokensPtr& tokens, const EvalOptions& o) {
  if (o.carry) return data::streams(tokens, {o.context, o.micro_batch_size, o.documents, false, 0});
  return data::sliding_windows(tokens, {o.context, o.micro_batch_size, o.stride, o.documents});
}

}  // namespace

EvalResult evaluate(Session& session, const data::TokensPtr& tokens, const EvalOptions& options) {
  const auto start = Clock::now();
  layers::LanguageModel& model = session.language_model("evaluation of perplexity");
  model.set_training(false);
  const data::DatasetPtr windows = windows_of(tokens, options);
  const std::vector<int64_t> lengths = token_lengths(*session.data.tokenizer);
  std::unique_ptr<CarriedState> carried;
  if (options.carry)
    carried = std::make_unique<CarriedState>(model.decoder(), options.micro_batch_size, options.context,
                                             session.parameters->options().compute, session.device);

  EvalResult r;
  data::Prefetcher batches(windows, 0);
  while (auto batch = batches.next()) {
    layers::ModelInput input = to_device(*batch, session.device);
    layers::DecoderState state;
    if (carried) {
      carried->set_resets(batch->resets);
      state = carried->begin();
      input.state = &state;
    }
    const Tensor nll = model.token_nll(input);
    if (carried) carried->keep(state);
    const auto values = nll.to_vector<float>();
    const int64_t* targets = batch->targets.data<int64_t>();
    for (size_t i = 0; i < values.size(); ++i) {
      if (targets[i] == data::kIgnore) continue;
      if (options.max_tokens > 0 && r.tokens >= options.max_tokens) break;
      r.total_nll += values[i];
      r.bytes += lengths[static_cast<size_t>(targets[i])];
      ++r.tokens;
    }
    if (options.max_tokens > 0 && r.tokens >= options.max_tokens) break;
  }
  KRAIT_CHECK(r.tokens > 0, "{}: {} token(s), nothing to predict; a split needs at least 2", tokens->where(),
              tokens->size());
  r.whole_split = r.tokens == windows->total_targets();
  r.nll = r.total_nll / static_cast<double>(r.tokens);
  r.ppl = std::exp(r.nll);
  if (r.bytes > 0) {
    r.bpb = r.total_nll / std::numbers::ln2 / static_cast<double>(r.bytes);
    r.byte_ppl = std::exp2(r.bpb);
  }
  r.words = tokens->counts().words + tokens->counts().lines;
  if (r.whole_split && r.words > 0) r.word_ppl = std::exp(r.total_nll / static_cast<double>(r.words));
  r.seconds = seconds_since(start);
  return r;
}

namespace {

/// What a batch of a task adds: likelihood, right answers, squared error, how many.
struct Score {
  double nll = 0, correct = 0, squared_error = 0;
  int64_t count = 0, values = 0;
};

void score_tokens(layers::LanguageModel& model, const data::Batch& batch, Device device, Score& score) {
  std::vector<int64_t> places, wanted;
  const int64_t* targets = batch.targets.data<int64_t>();
  for (int64_t i = 0; i < batch.targets.numel(); ++i) {
    if (targets[i] == data::kIgnore) continue;
    places.push_back(i);
    wanted.push_back(targets[i]);
  }
  if (places.empty()) return;
  const auto [nll, likeliest] =
      model.answers(to_device(batch, device), from_vector(places).to(device), from_vector(wanted).to(device));
  for (const float value : nll.to_vector<float>()) score.nll += value;
  const auto predicted = likeliest.to_vector<int64_t>();
  for (size_t i = 0; i < wanted.size(); ++i) score.correct += predicted[i] == wanted[i] ? 1 : 0;
  score.count += static_cast<int64_t>(wanted.size());
}

void score_labels(const std::vector<double>& logits, const data::Batch& batch, Score& score) {
  const int64_t b = batch.labels.numel(), classes = static_cast<int64_t>(logits.size()) / b;
  for (int64_t row = 0; row < b; ++row) {
    const int64_t label = batch.labels.data<int64_t>()[row];
    if (label == data::kIgnore) continue;
    const double* x = logits.data() + row * classes;
    const double* top = std::max_element(x, x + classes);
    double sum = 0;
    for (int64_t c = 0; c < classes; ++c) sum += std::exp(x[c] - *top);
    score.nll += std::log(sum) + *top - x[label];
    score.correct += top - x == label ? 1 : 0;
    ++score.count;
  }
}

void score_values(const std::vector<double>& predicted, const data::Batch& batch, Score& score) {
  const auto wanted = batch.values.to_vector<double>();
  const int64_t outputs = batch.values.size(1);
  for (int64_t i = 0; i < batch.n_rows * outputs; ++i) {
    const double error = predicted[static_cast<size_t>(i)] - wanted[static_cast<size_t>(i)];
    score.squared_error += error * error;
  }
  score.count += batch.n_rows;
  score.values += batch.n_rows * outputs;
}

}  // namespace

EvalResult evaluate_task(Session& session, const data::DatasetPtr& split) {
  const auto start = Clock::now();
  layers::Model& model = *session.model;
  model.set_training(false);
  auto* language_model = dynamic_cast<layers::LanguageModel*>(&model);
  Score score;
  data::Prefetcher batches(split, 0);
  while (auto batch = batches.next()) {
    if (language_model) {
      score_tokens(*language_model, *batch, session.device, score);
      continue;
    }
    const NoGrad guard;
    const auto answers = model.predict(to_device(*batch, session.device)).data().to_vector<double>();
    if (batch->labels.defined())
      score_labels(answers, *batch, score);
    else
      score_values(answers, *batch, score);
  }
  EvalResult r;
  r.tokens = score.count;
  KRAIT_CHECK(r.tokens > 0, "the split has no example");
  if (score.values > 0) {
    r.nll = score.squared_error / static_cast<double>(score.values);
    r.rmse = std::sqrt(r.nll);
  } else {
    r.nll = score.nll / static_cast<double>(r.tokens);
    r.accuracy = score.correct / static_cast<double>(r.tokens);
  }
  r.total_nll = score.nll;
  r.ppl = std::exp(r.nll);
  r.seconds = seconds_since(start);
  return r;
}

EvalOptions eval_options(const Config& config) {
  const EvalConfig& e = config.eval;
  return {e.context,    e.stride, e.micro_batch_size, e.max_tokens, data::documents_from_name(config.data.documents),
          config.data.state == "carry"};
}

std::string describe_convention(const EvalOptions& o) {
  const std::string windows =
      o.carry ? fmt::format("streaming in windows of {} tokens, {} stream(s); the state goes on from window to window",
                            o.context, o.micro_batch_size)
      : o.stride == o.context
          ? fmt::format("windows of {} tokens without overlap", o.context)
          : fmt::format("sliding windows of {} tokens, stride {}: each token sees at least {} before it", o.context,
                        o.stride, o.context - o.stride);
  return windows + (o.documents == data::Documents::pack ? "; documents apart, their first tokens not predicted"
                                                         : "; the split as one text, its first token not predicted") +
         "; bits per byte over the bytes of the predicted tokens; word perplexity over words and line ends";
}

}  // namespace krait::train

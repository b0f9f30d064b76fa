#include "train/evaluate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "core/comm/collectives.h"
#include "train/carried_state.h"
#include "train/clock.h"

namespace krait::train {

namespace {

// Bytes of text that each token stands for; 0 where that is not known.
std::vector<int64_t> token_lengths(const data::Tokenizer& tokenizer) {
  std::vector<int64_t> lengths(static_cast<size_t>(tokenizer.vocab_size()));
  for (size_t i = 0; tokenizer.has_text() && i < lengths.size(); ++i)
    lengths[i] = static_cast<int64_t>(tokenizer.token_bytes(static_cast<int32_t>(i)).size());
  return lengths;
}

data::DatasetPtr windows_of(const data::TokensPtr& tokens, const EvalOptions& o) {
  if (o.carry) return data::streams(tokens, {o.context, o.micro_batch_size, o.documents, false, 0});
  return data::sliding_windows(tokens, {o.context, o.micro_batch_size, o.stride, o.documents});
}

}  // namespace

namespace {

/// How the batches of an evaluation are shared by the data ranks: batch i is rank i mod D's, or, where state is carried
/// from batch to batch, each rank has rows of all, or runs all where the rows cannot be shared. Sums are put together in the order of the batches, so that they do
/// not depend on the number of ranks (with carried state: but for their rounding).
class Share {
 public:
  /// carried: state goes on from batch to batch. limited: not all targets count.
  Share(const Session& session, const data::Dataset& dataset, bool carried = false, bool limited = false)
      : data_(*session.mesh.data), by_rows_(carried && !limited && dataset.batch_size() % data_.size() == 0),
        all_(carried && !by_rows_), batches_(dataset.steps()) {}
  bool by_rows() const { return by_rows_; }
  /// Whether all ranks come to this batch having run as many as each other.
  bool together(int64_t batch) const { return batch % data_.size() == 0; }
  bool own(int64_t batch) const { return by_rows_ || all_ || batch % data_.size() == data_.rank(); }
  int64_t parts() const { return by_rows_ ? data_.size() : 1; }
  int64_t part() const { return by_rows_ ? data_.rank() : 0; }

  /// How many batches this rank runs for company after its own of `all` batches: with ZeRO-3 all ranks use their
  /// parameters together.
  int64_t idle(const Session& session, int64_t all) const {
    if (session.config.parallelism.zero < 3 || by_rows_ || all_) return 0;
    return (all + data_.size() - 1) / data_.size() - (all - data_.rank() + data_.size() - 1) / data_.size();
  }

  /// values: k numbers for each batch this rank has run, in order. Returns the sums over all batches.
  std::vector<double> sum(const std::vector<double>& values, int64_t k) const {
    const bool gathers = data_.size() > 1 && !all_;
    const int64_t ranks = gathers ? data_.size() : 1;
    const int64_t most = by_rows_ ? batches_ : (batches_ + ranks - 1) / ranks;
    Tensor all = zeros({ranks, most * k}, DType::f64, kCpu);
    Tensor own_values = zeros({most * k}, DType::f64, kCpu);
    std::copy(values.begin(), values.end(), own_values.data<double>());
    if (gathers) data_.all_gather(own_values, all.view({-1})).wait();
    else copy_(all, own_values.view(all.shape()));
    std::vector<double> sums(static_cast<size_t>(k), 0.0);
    for (int64_t i = 0; i < most; ++i)
      for (int64_t r = 0; r < ranks; ++r)
        for (int64_t j = 0; j < k; ++j) sums[static_cast<size_t>(j)] += all.data<double>()[(r * most + i) * k + j];
    return sums;
  }

 private:
  comm::ProcessGroup& data_;
  bool by_rows_, all_;
  int64_t batches_;
};

double part_of(int64_t done, int64_t all) { return all > 0 ? static_cast<double>(done) / static_cast<double>(all) : 0; }

// Whether to go on.
bool tell(const EvalProgress& progress, double share) { return !progress || progress(share); }

EvalResult stopped_result() {
  EvalResult r;
  r.stopped = true;
  return r;
}

int64_t counted(const data::Batch& batch) {
  const int64_t* targets = batch.targets.data<int64_t>();
  return std::count_if(targets, targets + batch.targets.numel(), [](int64_t t) { return t != data::kIgnore; });
}

}  // namespace

EvalResult evaluate(Session& session, const data::TokensPtr& tokens, const EvalOptions& options, const EvalProgress& progress) {
  const auto start = Clock::now();
  layers::LanguageModel& model = session.language_model("evaluation of perplexity");
  model.set_training(false);
  const data::DatasetPtr windows = windows_of(tokens, options);
  const Share share(session, *windows, options.carry, options.max_tokens > 0);
  comm::ProcessGroup& sequence = *session.mesh.sequence;
  const std::vector<int64_t> lengths = token_lengths(*session.data.tokenizer);
  const int64_t unknown_id = session.data.tokenizer->unknown_id();
  std::unique_ptr<CarriedState> carried;
  if (options.carry)
    carried = std::make_unique<CarriedState>(model.decoder(), options.micro_batch_size / share.parts(), options.context,
                                             session.parameters->options().compute, session.device);

  int64_t seen = 0, batch_index = 0;  // targets of the batches before, of all ranks
  std::vector<double> sums;           // likelihood, tokens, bytes, unknown tokens of each own batch
  data::Prefetcher batches(windows, 0, share.part(), share.parts());
  for (; auto batch = batches.next(); ++batch_index) {
    const int64_t left = options.max_tokens > 0 ? options.max_tokens - seen : std::numeric_limits<int64_t>::max();
    if (left <= 0) break;
    const double done = std::max(part_of(batch_index, windows->steps()), part_of(seen, options.max_tokens));
    if (share.together(batch_index) && !tell(progress, done)) return stopped_result();
    seen += counted(*batch);
    if (!share.own(batch_index)) continue;
    layers::ModelInput input = model_input(*batch, session.device, sequence);
    layers::DecoderState state;
    if (carried) {
      carried->set_resets(batch->resets);
      state = carried->begin();
      input.state = &state;
    }
    Tensor nll = model.token_nll(input);
    if (sequence.size() > 1) nll = comm::all_gather(nll, 1, sequence);
    if (carried) carried->keep(state);
    const auto values = nll.to_vector<float>();
    const int64_t* targets = batch->targets.data<int64_t>();
    double total = 0;
    int64_t bytes = 0, unknown = 0, count = 0;
    for (size_t i = 0; i < values.size() && count < left; ++i) {
      if (targets[i] == data::kIgnore) continue;
      total += values[i];
      bytes += lengths[static_cast<size_t>(targets[i])];
      unknown += targets[i] == unknown_id;
      ++count;
    }
    sums.insert(sums.end(), {total, static_cast<double>(count), static_cast<double>(bytes), static_cast<double>(unknown)});
  }
  for (int64_t i = share.idle(session, batch_index); i > 0; --i)
    (void)model.token_nll(model_input(windows->get(0), session.device, sequence));
  const std::vector<double> all = share.sum(sums, 4);
  tell(progress, 1);
  EvalResult r;
  r.total_nll = all[0];
  r.tokens = static_cast<int64_t>(all[1]);
  r.unknown = static_cast<int64_t>(all[3]);
  r.bytes = r.unknown > 0 ? 0 : static_cast<int64_t>(all[2]);
  KRAIT_CHECK(r.tokens > 0, "{}: {} token(s), nothing to predict; a split needs at least 2", tokens->where(),
              tokens->size());
  r.split_tokens = windows->total_targets();
  r.whole_split = r.tokens == r.split_tokens;
  r.nll = r.total_nll / static_cast<double>(r.tokens);
  r.ppl = std::exp(r.nll);
  if (r.bytes > 0) {
    r.bpb = r.total_nll / std::numbers::ln2 / static_cast<double>(r.bytes);
    r.byte_ppl = std::exp2(r.bpb);
  }
  r.words = tokens->counts().words + tokens->counts().lines;
  // Packed documents leave the first token of each out, but their words are counted.
  if (r.tokens == tokens->size() - 1 && r.words > 0) r.word_ppl = std::exp(r.total_nll / static_cast<double>(r.words));
  r.seconds = seconds_since(start);
  return r;
}

namespace {

/// What a batch of a task adds: likelihood, right answers, squared error, how many.
struct Score {
  double nll = 0, correct = 0, squared_error = 0;
  int64_t count = 0, values = 0;
};

void score_tokens(layers::LanguageModel& model, const data::Batch& batch, const Session& session, Score& score) {
  std::vector<int64_t> places, wanted;
  const int64_t* targets = batch.targets.data<int64_t>();
  for (int64_t i = 0; i < batch.targets.numel(); ++i) {
    if (targets[i] == data::kIgnore) continue;
    places.push_back(i);
    wanted.push_back(targets[i]);
  }
  if (places.empty()) return;
  const Device device = session.device;
  const auto [nll, likeliest] = model.answers(model_input(batch, device, *session.mesh.sequence),
                                              from_vector(places).to(device), from_vector(wanted).to(device));
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

EvalResult evaluate_task(Session& session, const data::DatasetPtr& split, const EvalProgress& progress) {
  const auto start = Clock::now();
  layers::Model& model = *session.model;
  model.set_training(false);
  auto* language_model = dynamic_cast<layers::LanguageModel*>(&model);
  const comm::ProcessGroup& data = *session.mesh.data;
  const Share share(session, *split);
  std::vector<double> scores;  // of each own batch
  data::Prefetcher batches(split, data.rank(), 0, 1, 3, data.size());
  for (int64_t done = 0; done < split->steps(); done += data.size()) {
    if (!tell(progress, part_of(done, split->steps()))) return stopped_result();
    const auto batch = batches.next();
    if (!batch) break;  // the others have one more
    Score score;
    if (language_model) {
      score_tokens(*language_model, *batch, session, score);
    } else {
      const NoGrad guard;
      const auto answers =
          model.predict(model_input(*batch, session.device, *session.mesh.sequence)).data().to_vector<double>();
      if (batch->labels.defined())
        score_labels(answers, *batch, score);
      else
        score_values(answers, *batch, score);
    }
    scores.insert(scores.end(), {score.nll, score.correct, score.squared_error, static_cast<double>(score.count),
                                 static_cast<double>(score.values)});
  }
  for (int64_t i = share.idle(session, split->steps()); i > 0; --i) {
    const NoGrad guard;
    const layers::ModelInput input = model_input(split->get(0), session.device, *session.mesh.sequence);
    if (language_model) (void)language_model->token_nll(input);
    else (void)model.predict(input);
  }
  const std::vector<double> all = share.sum(scores, 5);
  tell(progress, 1);
  const Score score{all[0], all[1], all[2], static_cast<int64_t>(all[3]), static_cast<int64_t>(all[4])};
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

std::string describe_convention(const EvalOptions& o, const EvalResult& r) {
  const std::string windows =
      o.carry ? fmt::format("streaming in windows of {} tokens, {} stream(s); the state goes on from window to window",
                            o.context, o.micro_batch_size)
      : o.stride == o.context
          ? fmt::format("windows of {} tokens without overlap", o.context)
          : fmt::format("sliding windows of {} tokens, stride {}: each token sees at least {} before it", o.context,
                        o.stride, o.context - o.stride);
  return windows + (o.documents == data::Documents::pack ? "; documents apart, their first tokens not predicted"
                                                         : "; the split as one text, its first token not predicted") +
         (r.bytes > 0 ? "; bits per byte over the bytes of the predicted tokens" : "") +
         (r.unknown > 0 ? fmt::format("; no bits per byte: {} predicted tokens are unknown characters", r.unknown) : "") +
         (r.word_ppl > 0 ? "; word perplexity over words and line ends" : "");
}

}  // namespace krait::train

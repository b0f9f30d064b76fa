#include "train/evaluate.h"

#include <chrono>
#include <cmath>
#include <limits>
#include <numbers>

namespace krait::train {

namespace {

// Bytes of text that each token stands for.
std::vector<int64_t> token_lengths(const data::Tokenizer& tokenizer) {
  std::vector<int64_t> lengths(static_cast<size_t>(tokenizer.vocab_size()));
  for (size_t i = 0; i < lengths.size(); ++i)
    lengths[i] = static_cast<int64_t>(tokenizer.token_bytes(static_cast<int32_t>(i)).size());
  return lengths;
}

}  // namespace

EvalResult evaluate(Session& session, const data::TokensPtr& tokens, const EvalOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  layers::LanguageModel& model = session.language_model("evaluation of perplexity");
  model.set_training(false);
  const data::DatasetPtr windows = data::sliding_windows(
      tokens, {options.context, options.micro_batch_size, options.stride, options.documents});
  const std::vector<int64_t> lengths = token_lengths(*session.tokenizer);

  EvalResult r;
  data::Prefetcher batches(windows, 0);
  while (auto batch = batches.next()) {
    const Tensor nll = model.token_nll(to_device(*batch, session.device), nullptr);
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
  r.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return r;
}

std::string describe_convention(const EvalOptions& o) {
  const std::string windows =
      o.stride == o.context
          ? fmt::format("windows of {} tokens without overlap", o.context)
          : fmt::format("sliding windows of {} tokens, stride {}: each token sees at least {} before it", o.context,
                        o.stride, o.context - o.stride);
  return windows + (o.documents == data::Documents::pack ? "; documents apart, their first tokens not predicted"
                                                         : "; the split as one text, its first token not predicted") +
         "; bits per byte over the bytes of the predicted tokens; word perplexity over words and line ends";
}

}  // namespace krait::train

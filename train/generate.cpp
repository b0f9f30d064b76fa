#include "train/generate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/random.h"

namespace krait::train {

int64_t sample_token(const std::vector<float>& logits, double temperature, double top_p, int64_t top_k, double u) {
  std::vector<int64_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
  });
  if (temperature <= 0) return order[0];
  const size_t count = top_k > 0 ? std::min(static_cast<size_t>(top_k), order.size()) : order.size();
  std::vector<double> p(count);
  const double top = logits[static_cast<size_t>(order[0])];
  for (size_t i = 0; i < count; ++i)
    p[i] = std::exp((logits[static_cast<size_t>(order[i])] - top) / temperature);
  const double all = std::accumulate(p.begin(), p.end(), 0.0);
  double kept = 0;
  size_t n = 0;
  while (n < count && (n == 0 || kept < top_p * all)) kept += p[n++];
  double left = u * kept;
  for (size_t i = 0; i < n; ++i) {
    left -= p[i];
    if (left < 0) return order[i];
  }
  return order[n - 1];
}

int64_t generate(Session& session, const GenerateOptions& options,
                 const std::function<void(const std::string&)>& write) {
  layers::LanguageModel& model = session.language_model("generation");
  KRAIT_CHECK(session.data.tokenizer, "generation writes text, but this run learned the task {}",
              session.config.data.type);
  model.set_training(false);
  std::vector<int32_t> ids = session.data.tokenizer->encode(options.prompt);
  const int32_t eos = session.data.tokenizer->eos_id();
  // Without a prompt: a new document, or a line break where the vocabulary has no end-of-document token.
  if (ids.empty()) ids = eos >= 0 ? std::vector<int32_t>{eos} : session.data.tokenizer->encode("\n");
  KRAIT_CHECK(!ids.empty(), "the tokenizer turns this prompt into no token; give another --prompt");
  const auto prompt_length = static_cast<int64_t>(ids.size());
  KRAIT_CHECK(session.config.model.position != "learned" ||
                  prompt_length + options.max_tokens - 1 <= session.config.model.max_positions,
              "{} prompt tokens and {} new ones are more than the {} learned positions; lower --max-tokens to {}",
              prompt_length, options.max_tokens, session.config.model.max_positions,
              std::max<int64_t>(session.config.model.max_positions - prompt_length + 1, 0));

  layers::DecoderState state =
      model.initial_state(1, prompt_length + options.max_tokens, session.parameters->options());
  data::StreamDecoder decoder(session.data.tokenizer);
  const uint64_t key = random_key(options.seed, "generate");
  Tensor tokens = from_vector(ids, Shape{1, prompt_length});
  int64_t made = 0;
  for (; made < options.max_tokens; ++made) {
    const Tensor logits = model.next_logits(tokens.to(session.device), state);
    const double u = uniform_from_bits(philox(key, static_cast<uint64_t>(made), 0).word[0]);
    const auto next = static_cast<int32_t>(
        sample_token(logits.select(0, 0).to_vector<float>(), options.temperature, options.top_p, options.top_k, u));
    if (next == eos) break;
    if (const std::string text = decoder.push(next); !text.empty()) write(text);
    tokens = from_vector(std::vector<int32_t>{next}, Shape{1, 1});
  }
  if (const std::string rest = decoder.finish(); !rest.empty()) write(rest);
  return made;
}

}  // namespace krait::train

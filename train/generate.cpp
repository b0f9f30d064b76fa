#include "train/generate.h"

#include <algorithm>

#include "core/random.h"
#include "train/decode.h"

namespace krait::train {

namespace {
constexpr int64_t kAhead = 8;  // tokens that a GPU makes between two looks at them
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
  if (options.max_tokens == 0) return 0;

  DecodeLoop loop(model, session.parameters->options(), 1, prompt_length + options.max_tokens, options.max_tokens,
                  {options.temperature, options.top_p, options.top_k, random_key(options.seed, "generate")},
                  session.config.runtime.cuda_graphs, options.states,
                  session.data.tokenizer->vocab_size());  // model.vocab_size may be more: ids without a text
  loop.prefill(from_vector(ids, Shape{1, prompt_length}));
  data::StreamDecoder decoder(session.data.tokenizer);
  const int64_t ahead = session.device.is_cuda() ? kAhead : 1;
  int64_t made = 0;
  for (bool over = false; !over;) {
    const std::vector<int64_t> tokens = loop.drawn().to_vector<int64_t>();
    for (; made < loop.count() && !over; ++made) {
      const auto next = static_cast<int32_t>(tokens[static_cast<size_t>(made)]);
      over = next == eos;
      if (over) break;
      if (const std::string text = decoder.push(next); !text.empty()) write(text);
    }
    over = over || made == options.max_tokens;
    for (int64_t i = 0; i < ahead && !over && loop.count() < options.max_tokens; ++i) loop.step();
  }
  if (const std::string rest = decoder.finish(); !rest.empty()) write(rest);
  return made;
}

}  // namespace krait::train

#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <source_location>
#include <unordered_map>

#include "core/error.h"
#include "data/tokenizer.h"
#include "data/utf8.h"

namespace krait::data {
namespace {

using sentencepiece::util::Status;

void check(const Status& status, std::string_view what, std::source_location where = std::source_location::current()) {
  if (status.ok()) return;
  std::string_view file = where.file_name();
  file.remove_prefix(file.rfind('/') + 1);
  throw_error(fmt::format("{}: {} (SentencePiece, {}:{})", what, status.message(), file, where.line()));
}

constexpr std::string_view kSpace = "\u2581";  // the library's stand-in for a space

class SentencePieceTokenizer final : public Tokenizer {
 public:
  SentencePieceTokenizer(std::string_view model, std::string_view source) : model_(model) {
    check(processor_.LoadFromSerializedProto(model_), fmt::format("{}: the SentencePiece model is damaged", source));
    bytes_.reserve(static_cast<size_t>(processor_.GetPieceSize()));
    for (int id = 0; id < processor_.GetPieceSize(); ++id) bytes_.push_back(bytes_of(id));
  }
  std::string name() const override { return "sentencepiece"; }
  int64_t vocab_size() const override { return static_cast<int64_t>(bytes_.size()); }
  int32_t eos_id() const override { return processor_.eos_id(); }
  int32_t bos_id() const override { return processor_.bos_id(); }

  std::vector<int32_t> encode(std::string_view text) const override {
    const size_t bad = utf8::find_invalid(text);
    KRAIT_CHECK(bad == std::string_view::npos,
                "sentencepiece tokenizer: byte {} of the text (0x{:02X}) is not UTF-8; convert the text, or use the "
                "byte tokenizer",
                bad, static_cast<unsigned char>(text[bad]));
    std::vector<int32_t> ids;
    std::vector<int> line_ids;
    while (!text.empty()) {
      const size_t end = text.find('\n');
      const std::string_view line = text.substr(0, end == std::string_view::npos ? text.size() : end + 1);
      text.remove_prefix(line.size());
      check(processor_.Encode({line.data(), line.size()}, &line_ids), "sentencepiece tokenizer");
      ids.insert(ids.end(), line_ids.begin(), line_ids.end());
    }
    return ids;
  }

  std::string token_bytes(int32_t id) const override {
    check_id(id);
    return bytes_[static_cast<size_t>(id)];
  }
  std::string serialize() const override { return "krait-tokenizer 1 sentencepiece\n" + model_; }

 private:
  std::string bytes_of(int id) const {
    if (processor_.IsControl(id)) return {};
    const std::string& piece = processor_.IdToPiece(id);
    if (processor_.IsUnknown(id)) return "\uFFFD";
    if (processor_.IsByte(id)) return std::string(1, static_cast<char>(std::stoi(piece.substr(3, 2), nullptr, 16)));
    std::string out = piece;
    for (size_t at = 0; (at = out.find(kSpace, at)) != std::string::npos; ++at) out.replace(at, kSpace.size(), " ");
    return out;
  }

  sentencepiece::SentencePieceProcessor processor_;
  std::string model_;
  std::vector<std::string> bytes_;  // of each id
};

// Hands lines to the library one at a time.
class Lines final : public sentencepiece::SentenceIterator {
 public:
  explicit Lines(const std::function<std::optional<std::string>()>& next) : next_(next), line_(next_()) {}
  bool done() const override { return !line_; }
  void Next() override { line_ = next_(); }
  const std::string& value() const override { return *line_; }
  Status status() const override { return {}; }

 private:
  const std::function<std::optional<std::string>()>& next_;
  std::optional<std::string> line_;
};

}  // namespace

TokenizerPtr load_sentencepiece(std::string_view model, std::string_view source) {
  return std::make_shared<SentencePieceTokenizer>(model, source);
}

TokenizerPtr train_sentencepiece(const std::function<std::optional<std::string>()>& next,
                                 const SentencePieceOptions& options) {
  KRAIT_CHECK(options.model == "unigram" || options.model == "bpe",
              "sentencepiece: the model '{}' is unknown; choose unigram or bpe", options.model);
  const int64_t least = options.byte_fallback ? 256 + 3 + 1 : 3 + 2;
  KRAIT_CHECK(
      options.vocab_size >= least,
      "sentencepiece: a vocabulary of {} is too small: {} ids are needed before the first character; try 1024 or more",
      options.vocab_size, least - 1);
  std::unordered_map<std::string, std::string> settings{
      {"model_type", options.model},
      {"vocab_size", std::to_string(options.vocab_size)},
      {"hard_vocab_limit", "false"},
      {"byte_fallback", options.byte_fallback ? "true" : "false"},
      {"normalization_rule_name", "identity"},
      {"remove_extra_whitespaces", "false"},
      {"add_dummy_prefix", "false"},
      {"allow_whitespace_only_pieces", "true"},
      {"character_coverage", options.byte_fallback ? "0.9999" : "1.0"},
      {"shuffle_input_sentence", "false"},
      {"max_sentence_length", "16384"},
      {"num_threads", "4"},  // fixed: the partial sums of the EM steps depend on it
      {"minloglevel", "2"}};
  if (!options.byte_fallback) settings["user_defined_symbols"] = "\n";
  std::string model;
  Lines lines(next);
  KRAIT_CHECK(!lines.done(), "sentencepiece: there is no text to train on");
  check(sentencepiece::SentencePieceTrainer::Train(settings, &lines, &model),
        fmt::format(
            "sentencepiece: training a {} vocabulary of {} failed; a larger --vocab-size, or more text, often helps",
            options.model, options.vocab_size));
  return load_sentencepiece(model, "the SentencePiece model just trained");
}

}  // namespace krait::data

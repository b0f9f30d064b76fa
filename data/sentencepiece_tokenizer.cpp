#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <mutex>
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

// The library's stand-in for a space. A text's own is no space: it is kept from the library and encoded as its bytes.
constexpr std::string_view kSpace = "\u2581";

class SentencePieceTokenizer final : public Tokenizer {
 public:
  SentencePieceTokenizer(std::string_view model, std::string_view source) : model_(model) {
    check(processor_.LoadFromSerializedProto(model_), fmt::format("{}: the SentencePiece model is damaged", source));
    bytes_.reserve(static_cast<size_t>(processor_.GetPieceSize()));
    for (int id = 0; id < processor_.GetPieceSize(); ++id) bytes_.push_back(bytes_of(id));
    for (const char c : kSpace) {
      const int id = processor_.PieceToId(fmt::format("<0x{:02X}>", static_cast<unsigned char>(c)));
      if (processor_.IsByte(id)) space_ids_.push_back(id);
    }
    if (space_ids_.size() < kSpace.size()) space_ids_ = {processor_.unk_id()};
  }
  std::string name() const override { return "sentencepiece"; }
  int64_t vocab_size() const override { return static_cast<int64_t>(bytes_.size()); }
  int32_t eos_id() const override { return processor_.eos_id(); }
  int32_t bos_id() const override { return processor_.bos_id(); }
  int32_t unknown_id() const override { return processor_.unk_id(); }

  std::vector<int32_t> encode(std::string_view text) const override {
    const size_t bad = utf8::find_invalid(text);
    KRAIT_CHECK(bad == std::string_view::npos,
                "sentencepiece tokenizer: byte {} of the text (0x{:02X}) is not UTF-8; convert the text, or use the "
                "byte tokenizer",
                bad, static_cast<unsigned char>(text[bad]));
    // No piece has a space behind another character, or a line end, so words with the spaces before them are
    // independent, and a cache of them saves most of the work.
    std::unique_ptr<Cache> cache = borrow_cache();
    std::vector<int32_t> ids;
    ids.reserve(text.size() / 3);
    std::string word;
    std::vector<int> word_ids;
    for (size_t at = 0, end = 0; at < text.size(); at = end) {
      end = word_end(text, at);
      if (text.substr(at, end - at) == kSpace) {
        ids.insert(ids.end(), space_ids_.begin(), space_ids_.end());
        continue;
      }
      word.assign(text, at, end - at);
      const bool fits = word.size() <= kMaxWord;
      const auto found = fits ? cache->find(word) : cache->end();
      if (found == cache->end()) check(processor_.Encode(word, &word_ids), "sentencepiece tokenizer");
      const std::vector<int>& got = found == cache->end() ? word_ids : found->second;
      ids.insert(ids.end(), got.begin(), got.end());
      if (fits && found == cache->end()) cache->emplace(word, word_ids);
      if (cache->size() >= kMaxCached) cache->clear();
    }
    const std::lock_guard lock(mutex_);
    idle_caches_.push_back(std::move(cache));
    return ids;
  }

  std::string token_bytes(int32_t id) const override {
    check_id(id);
    return bytes_[static_cast<size_t>(id)];
  }
  std::string serialize() const override { return "krait-tokenizer 1 sentencepiece\n" + model_; }

 private:
  using Cache = std::unordered_map<std::string, std::vector<int>>;
  static constexpr size_t kMaxCached = size_t{1} << 17;  // words; about 20 MB

  static constexpr size_t kMaxWord = 64;  // bytes

  // One for each call at a time, kept for later calls. An exception loses it, which is harmless.
  std::unique_ptr<Cache> borrow_cache() const {
    const std::lock_guard lock(mutex_);
    if (idle_caches_.empty()) return std::make_unique<Cache>();
    std::unique_ptr<Cache> cache = std::move(idle_caches_.back());
    idle_caches_.pop_back();
    return cache;
  }

  // Of a word with the spaces before and the line end behind it; kSpace is a word of its own.
  static size_t word_end(std::string_view text, size_t at) {
    const auto stand_in = [&] { return text[at] == kSpace[0] && text.substr(at).starts_with(kSpace); };
    if (stand_in()) return at + kSpace.size();
    while (at < text.size() && text[at] == ' ') ++at;
    while (at < text.size() && text[at] != ' ' && text[at] != '\n' && !stand_in()) ++at;
    return at < text.size() && text[at] == '\n' ? at + 1 : at;
  }

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
  std::vector<int32_t> space_ids_;  // of the character kSpace
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Cache>> idle_caches_;
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
      {"split_by_whitespace", "true"},  // encode() relies on it
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

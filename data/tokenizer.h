#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace krait::data {

/// Text to token ids and back. Immutable, and safe to use from several threads.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  virtual std::string name() const = 0;  // "byte", "char", "sentencepiece", "ids"
  virtual int64_t vocab_size() const = 0;
  /// The id that ends a document; -1 when the vocabulary has none.
  virtual int32_t eos_id() const { return -1; }
  virtual int32_t bos_id() const { return -1; }
  /// false: ids of a tokenizer that is not here; "text" is decimal numbers, whose bytes say nothing of the text behind them.
  virtual bool has_text() const { return true; }
  /// The id of text that the vocabulary cannot spell, of any length; -1 when it spells all.
  virtual int32_t unknown_id() const { return -1; }

  virtual std::vector<int32_t> encode(std::string_view text) const = 0;
  /// The bytes one token stands for; they may be a part of a UTF-8 character. Special tokens give "".
  virtual std::string token_bytes(int32_t id) const = 0;
  /// The text of all ids. decode(encode(text)) == text, but for what became unknown_id().
  std::string decode(std::span<const int32_t> ids) const;

  /// Everything needed to make the same tokenizer again with load_tokenizer: stored in token stores and
  /// checkpoints, so that evaluation and generation need no other file.
  virtual std::string serialize() const = 0;

 protected:
  /// Throws when id is outside the vocabulary.
  void check_id(int32_t id) const;
};

using TokenizerPtr = std::shared_ptr<const Tokenizer>;

/// From serialize(). `source` names where the bytes came from, for the message when they are damaged.
TokenizerPtr load_tokenizer(std::string_view blob, std::string_view source);

/// 256 byte values; with `eos`, id 256 ends a document.
TokenizerPtr make_byte_tokenizer(bool eos);
/// One id for each code point, in the given (sorted) order; with `eos`, the last id ends a document.
TokenizerPtr make_char_tokenizer(std::vector<char32_t> sorted_alphabet, bool eos);

inline constexpr int64_t kMaxVocabulary = int64_t{1} << 31;  // ids are int32_t
/// Ids that another program made; eos_id -1: no id ends a document.
TokenizerPtr make_ids_tokenizer(int64_t vocab_size, int64_t eos_id);

/// SentencePiece with the text kept exactly: no normalisation, no removed spaces, no prefix. Words are encoded apart,
/// so the ids do not depend on how the text was cut into blocks of lines.
struct SentencePieceOptions {
  int64_t vocab_size = 8192;
  std::string model = "unigram";  // or "bpe"
  bool byte_fallback = true;      // unknown characters become bytes instead of <unk>
};
/// Trains on the lines that `next` gives until it returns nullopt. The library keeps them in memory.
/// The result does not depend on the number of threads. A small text may give a smaller vocabulary than asked for.
TokenizerPtr train_sentencepiece(const std::function<std::optional<std::string>()>& next,
                                 const SentencePieceOptions& options);
TokenizerPtr load_sentencepiece(std::string_view model_proto, std::string_view source);

/// Decoding as tokens arrive: gives text only when its UTF-8 is complete. For generation.
class StreamDecoder {
 public:
  explicit StreamDecoder(TokenizerPtr tokenizer) : tokenizer_(std::move(tokenizer)) {}
  /// The text that can be shown after this token; may be empty.
  std::string push(int32_t id);
  /// What is left, which is not complete UTF-8.
  std::string finish();

 private:
  TokenizerPtr tokenizer_;
  std::string pending_;
};

}  // namespace krait::data

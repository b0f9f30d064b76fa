#include "data/tokenizer.h"

#include <utility>

#include "core/error.h"
#include "data/utf8.h"

namespace krait::data {

// Blobs start with a line "krait-tokenizer 1 <name>"; the rest belongs to the kind.
TokenizerPtr load_byte_tokenizer(std::string_view body, std::string_view source);
TokenizerPtr load_char_tokenizer(std::string_view body, std::string_view source);
TokenizerPtr load_ids_tokenizer(std::string_view body, std::string_view source);

TokenizerPtr load_tokenizer(std::string_view blob, std::string_view source) {
  constexpr std::string_view kMagic = "krait-tokenizer 1 ";
  const size_t line = blob.find('\n');
  KRAIT_CHECK(blob.starts_with(kMagic) && line != std::string_view::npos,
              "{}: the tokenizer is damaged, or was written by a newer Krait", source);
  const std::string_view name = blob.substr(kMagic.size(), line - kMagic.size());
  const std::string_view body = blob.substr(line + 1);
  if (name == "byte") return load_byte_tokenizer(body, source);
  if (name == "char") return load_char_tokenizer(body, source);
  if (name == "sentencepiece") return load_sentencepiece(body, source);
  if (name == "ids") return load_ids_tokenizer(body, source);
  throw_error(fmt::format("{}: unknown tokenizer '{}'; this build knows byte, char, sentencepiece and ids", source, name));
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::string out;
  for (const int32_t id : ids) out += token_bytes(id);
  return out;
}

void Tokenizer::check_id(int32_t id) const {
  KRAIT_CHECK(id >= 0 && id < vocab_size(), "{} tokenizer: token {} is outside its vocabulary of {}", name(), id,
              vocab_size());
}

std::string StreamDecoder::push(int32_t id) {
  pending_ += tokenizer_->token_bytes(id);
  const size_t complete = utf8::complete_prefix(pending_);
  std::string out = pending_.substr(0, complete);
  pending_.erase(0, complete);
  return out;
}

std::string StreamDecoder::finish() { return std::exchange(pending_, {}); }

}  // namespace krait::data

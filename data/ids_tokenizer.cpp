#include <charconv>

#include "core/error.h"
#include "data/tokenizer.h"

namespace krait::data {
namespace {

constexpr std::string_view kSpace = " \t\r\n";

// Ids of a tokenizer that is not here. Where others have text this one has decimal numbers.
class IdsTokenizer final : public Tokenizer {
 public:
  IdsTokenizer(int64_t vocab_size, int64_t eos) : vocab_size_(vocab_size), eos_(static_cast<int32_t>(eos)) {}
  std::string name() const override { return "ids"; }
  int64_t vocab_size() const override { return vocab_size_; }
  int32_t eos_id() const override { return eos_; }
  bool has_text() const override { return false; }
  std::vector<int32_t> encode(std::string_view text) const override {
    std::vector<int32_t> ids;
    for (size_t at = 0; (at = text.find_first_not_of(kSpace, at)) != std::string_view::npos;) {
      const std::string_view word = text.substr(at, text.find_first_of(kSpace, at) - at);
      int32_t id = -1;
      const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), id);
      KRAIT_CHECK(error == std::errc() && end == word.data() + word.size() && id >= 0 && id < vocab_size_,
                  "byte {}: found {}, expected ids from 0 to {} as decimal numbers (binary ones: krait data prepare --format uint16)", at,
                  shown(word), vocab_size_ - 1);
      ids.push_back(id);
      at += word.size();
    }
    return ids;
  }
  std::string token_bytes(int32_t id) const override {
    check_id(id);
    return fmt::format("{} ", id);
  }
  std::string serialize() const override { return fmt::format("krait-tokenizer 1 ids\nvocab_size {}\neos {}\n", vocab_size_, eos_); }

 private:
  static std::string shown(std::string_view word) {
    for (const char c : word)
      if (c < 0x20 || c > 0x7e) return fmt::format("byte 0x{:02X}", static_cast<unsigned char>(c));
    return fmt::format("'{}'", word.substr(0, 40));
  }
  int64_t vocab_size_;
  int32_t eos_;
};

}  // namespace

TokenizerPtr make_ids_tokenizer(int64_t vocab_size, int64_t eos_id) {
  KRAIT_CHECK(vocab_size > 0 && vocab_size <= kMaxVocabulary && eos_id >= -1 && eos_id < vocab_size,
              "ids tokenizer: a vocabulary of {}, end of document {}", vocab_size, eos_id);
  return std::make_shared<IdsTokenizer>(vocab_size, eos_id);
}

TokenizerPtr load_ids_tokenizer(std::string_view body, std::string_view source) {
  const auto number = [&](std::string_view key) {
    int64_t value = 0;
    const size_t line = std::min(body.find('\n'), body.size());
    const auto [end, error] = std::from_chars(body.data() + std::min(key.size(), line), body.data() + line, value);
    KRAIT_CHECK(body.starts_with(key) && error == std::errc() && end == body.data() + line && line < body.size(),
                "{}: the ids tokenizer's description is damaged", source);
    body.remove_prefix(line + 1);
    return value;
  };
  const int64_t vocab_size = number("vocab_size "), eos = number("eos ");
  KRAIT_CHECK(body.empty() && vocab_size > 0 && vocab_size <= kMaxVocabulary && eos >= -1 && eos < vocab_size,
              "{}: the ids tokenizer's description is damaged", source);
  return make_ids_tokenizer(vocab_size, eos);
}

}  // namespace krait::data

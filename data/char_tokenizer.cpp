#include <algorithm>
#include <unordered_map>

#include "core/error.h"
#include "data/tokenizer.h"
#include "data/utf8.h"

namespace krait::data {
namespace {

class CharTokenizer final : public Tokenizer {
 public:
  CharTokenizer(std::vector<char32_t> alphabet, bool eos) : alphabet_(std::move(alphabet)), eos_(eos) {
    for (size_t i = 0; i < alphabet_.size(); ++i) {
      const auto id = static_cast<int32_t>(i);
      if (alphabet_[i] < 128)
        ascii_[alphabet_[i]] = id;
      else
        others_.emplace(alphabet_[i], id);
    }
  }
  std::string name() const override { return "char"; }
  int64_t vocab_size() const override { return static_cast<int64_t>(alphabet_.size()) + (eos_ ? 1 : 0); }
  int32_t eos_id() const override { return eos_ ? static_cast<int32_t>(alphabet_.size()) : -1; }

  std::vector<int32_t> encode(std::string_view text) const override {
    std::vector<int32_t> ids;
    ids.reserve(text.size());
    for (size_t at = 0; at < text.size();) {
      const utf8::CodePoint c = utf8::first(text.substr(at));
      KRAIT_CHECK(
          c.size > 0,
          "char tokenizer: byte {} of the text (0x{:02X}) is not UTF-8; convert the text, or use the byte tokenizer",
          at, static_cast<unsigned char>(text[at]));
      const int32_t id = find(c.value);
      KRAIT_CHECK(
          id >= 0,
          "char tokenizer: the character {} at byte {} (character {}) is not among its {} characters; remove it, "
          "prepare the data again with this text included, or use the byte tokenizer",
          utf8::describe(c.value), at, ids.size(), alphabet_.size());
      ids.push_back(id);
      at += c.size;
    }
    return ids;
  }

  std::string token_bytes(int32_t id) const override {
    check_id(id);
    std::string out;
    if (id != eos_id()) utf8::append(out, alphabet_[static_cast<size_t>(id)]);
    return out;
  }

  std::string serialize() const override {
    std::string out = fmt::format("krait-tokenizer 1 char\neos {}\n", eos_ ? 1 : 0);
    for (const char32_t c : alphabet_) utf8::append(out, c);
    return out;
  }

 private:
  int32_t find(char32_t c) const {
    if (c < 128) return ascii_[c];
    const auto it = others_.find(c);
    return it == others_.end() ? -1 : it->second;
  }

  std::vector<char32_t> alphabet_;
  std::vector<int32_t> ascii_ = std::vector<int32_t>(128, -1);
  std::unordered_map<char32_t, int32_t> others_;
  bool eos_;
};

}  // namespace

TokenizerPtr make_char_tokenizer(std::vector<char32_t> alphabet, bool eos) {
  KRAIT_CHECK(!alphabet.empty(), "char tokenizer: the alphabet is empty");
  KRAIT_CHECK(std::is_sorted(alphabet.begin(), alphabet.end(), std::less_equal<>()),
              "char tokenizer: the alphabet is not sorted, or holds a character twice");
  return std::make_shared<CharTokenizer>(std::move(alphabet), eos);
}

TokenizerPtr load_char_tokenizer(std::string_view body, std::string_view source) {
  const bool known = body.starts_with("eos 0\n") || body.starts_with("eos 1\n");
  KRAIT_CHECK(known && utf8::find_invalid(body) == std::string_view::npos,
              "{}: the char tokenizer's alphabet is damaged", source);
  const bool eos = body.starts_with("eos 1\n");
  body.remove_prefix(6);
  std::vector<char32_t> alphabet;
  while (!body.empty()) {
    const utf8::CodePoint c = utf8::first(body);
    alphabet.push_back(c.value);
    body.remove_prefix(c.size);
  }
  KRAIT_CHECK(!alphabet.empty() && std::is_sorted(alphabet.begin(), alphabet.end(), std::less_equal<>()),
              "{}: the char tokenizer's alphabet is damaged", source);
  return make_char_tokenizer(std::move(alphabet), eos);
}

}  // namespace krait::data

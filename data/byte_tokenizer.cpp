#include "core/error.h"
#include "data/tokenizer.h"

namespace krait::data {
namespace {

class ByteTokenizer final : public Tokenizer {
 public:
  explicit ByteTokenizer(bool eos) : eos_(eos) {}
  std::string name() const override { return "byte"; }
  int64_t vocab_size() const override { return eos_ ? 257 : 256; }
  int32_t eos_id() const override { return eos_ ? 256 : -1; }
  std::vector<int32_t> encode(std::string_view text) const override {
    std::vector<int32_t> ids(text.size());
    for (size_t i = 0; i < text.size(); ++i) ids[i] = static_cast<unsigned char>(text[i]);
    return ids;
  }
  std::string token_bytes(int32_t id) const override {
    check_id(id);
    return id < 256 ? std::string(1, static_cast<char>(id)) : std::string();
  }
  std::string serialize() const override { return fmt::format("krait-tokenizer 1 byte\neos {}\n", eos_ ? 1 : 0); }

 private:
  bool eos_;
};

}  // namespace

TokenizerPtr make_byte_tokenizer(bool eos) { return std::make_shared<ByteTokenizer>(eos); }

TokenizerPtr load_byte_tokenizer(std::string_view body, std::string_view source) {
  KRAIT_CHECK(body == "eos 0\n" || body == "eos 1\n", "{}: the byte tokenizer's description is damaged", source);
  return make_byte_tokenizer(body == "eos 1\n");
}

}  // namespace krait::data

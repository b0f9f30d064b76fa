#include "data/tokenizer.h"

#include "data/sha256.h"
#include "data/utf8.h"
#include "tests/testing/catch.h"

using namespace krait;
using namespace krait::data;

namespace {

TokenizerPtr again(const TokenizerPtr& t) { return load_tokenizer(t->serialize(), "blob"); }

TokenizerPtr trained(const std::string& model, bool byte_fallback, int64_t vocab) {
  int line = 0;
  return train_sentencepiece(
      [&]() -> std::optional<std::string> {
        static const char* kWords[] = {"the", "cat", "sat", "on",    "a",     "mat",
                                       "and", "saw", "dog", "under", "trees", "walking"};
        if (line++ == 400) return std::nullopt;
        std::string text;
        for (int i = 0; i < 9; ++i) text += std::string(i ? " " : "") + kWords[(line * (i + 3) + i * i) % 12];
        return text;
      },
      {.vocab_size = vocab, .model = model, .byte_fallback = byte_fallback});
}

}  // namespace

TEST_CASE("byte tokens are the bytes, and eos is 256") {
  const TokenizerPtr plain = make_byte_tokenizer(false), eos = again(make_byte_tokenizer(true));
  CHECK(plain->vocab_size() == 256);
  CHECK(plain->eos_id() == -1);
  CHECK(eos->vocab_size() == 257);
  CHECK(eos->eos_id() == 256);
  std::string all;
  for (int i = 0; i < 256; ++i) all.push_back(static_cast<char>(i));
  CHECK(plain->decode(plain->encode(all)) == all);
  CHECK(eos->decode(std::vector<int32_t>{72, 256, 105}) == "Hi");
  CHECK(contains(error_of([&] { (void)plain->decode(std::vector<int32_t>{256}); }), "outside its vocabulary of 256"));
}

TEST_CASE("char tokens are the sorted code points") {
  const TokenizerPtr t = again(make_char_tokenizer({U'\n', U'a', U'z', U'é', U'漢'}, true));
  CHECK(t->vocab_size() == 6);
  CHECK(t->eos_id() == 5);
  CHECK(t->encode("z\né漢") == std::vector<int32_t>{2, 0, 3, 4});
  CHECK(t->decode(t->encode("a漢é\n")) == "a漢é\n");
}

TEST_CASE("an unknown character is named with its place and what to do") {
  const TokenizerPtr t = make_char_tokenizer({U'a', U'é'}, false);
  const std::string message = error_of([&] { (void)t->encode("aéaüa"); });
  CHECK(contains(message, "'ü' (U+00FC) at byte 4 (character 3)"));
  CHECK(contains(message, "its 2 characters"));
  CHECK(contains(message, "byte tokenizer"));
  CHECK(contains(error_of([&] { (void)t->encode("a\xff"); }), "byte 1 of the text (0xFF) is not UTF-8"));
  CHECK(contains(error_of([&] { (void)make_char_tokenizer({U'b', U'a'}, false); }), "not sorted"));
}

TEST_CASE("sentencepiece keeps every byte of the text") {
  for (const std::string model : {"unigram", "bpe"}) {
    const TokenizerPtr t = again(trained(model, true, 330));
    CAPTURE(model, t->vocab_size());
    CHECK(t->vocab_size() <= 330);
    CHECK(t->vocab_size() > 260);
    CHECK(t->eos_id() >= 0);
    for (const std::string text :
         {"the cat sat", "  two  spaces \n\n tab\t and café 漢字 \xF0\x9F\x98\x80\n", "", "\n", " ", "x",
          // The library writes U+2581 for a space.
          "the\u2581cat", "\u2581", " \u2581\u2581 \n\u2581\n", "\u2585\u2047 <unk><s><0x0A>\r\n", "e\u0301\uFEFF\u2028"})
      CHECK(t->decode(t->encode(text)) == text);
    CHECK(t->encode("the cat sat on a mat").size() < 14);
    // Lines apart give the ids of the whole.
    std::vector<int32_t> apart = t->encode("the cat\n");
    for (const int32_t id : t->encode(" saw a dog")) apart.push_back(id);
    CHECK(apart == t->encode("the cat\n saw a dog"));
  }
}

TEST_CASE("sentencepiece without byte fallback keeps line ends and gives unknown for the rest") {
  const TokenizerPtr t = trained("unigram", false, 60);
  CHECK(t->decode(t->encode("the cat\nsat\n")) == "the cat\nsat\n");
  CHECK(contains(t->decode(t->encode("漢")), "\uFFFD"));
  CHECK(t->encode("a\u2581").back() == t->unknown_id());  // no space
}

TEST_CASE("sentencepiece refuses what it cannot do") {
  CHECK(contains(error_of([] { (void)trained("words", true, 400); }), "choose unigram or bpe"));
  CHECK(contains(error_of([] { (void)trained("bpe", true, 100); }), "too small"));
  CHECK(contains(error_of([] { (void)trained("bpe", false, 8); }), "training a bpe vocabulary of 8 failed"));
  CHECK(contains(error_of([] { (void)train_sentencepiece([] { return std::nullopt; }, {}); }), "no text"));
  const TokenizerPtr t = trained("unigram", true, 300);
  CHECK(contains(error_of([&] { (void)t->encode("ok \xC3("); }), "byte 3 of the text (0xC3) is not UTF-8"));
}

TEST_CASE("a damaged tokenizer is refused with the place it came from") {
  const std::string blobs[] = {"",
                               "krait-tokenizer 2 byte\n",
                               "krait-tokenizer 1 byte\neos 2\n",
                               "krait-tokenizer 1 word\n",
                               "krait-tokenizer 1 char\neos 0\nba",
                               "krait-tokenizer 1 char\neos 0\n\xff",
                               "krait-tokenizer 1 char\neos 1\n",
                               "krait-tokenizer 1 sentencepiece\nnonsense"};
  for (const std::string& blob : blobs) {
    CAPTURE(blob);
    CHECK(contains(error_of([&] { (void)load_tokenizer(blob, "a.h5: /tokenizer"); }), "a.h5: /tokenizer"));
  }
}

TEST_CASE("streamed decoding shows only complete characters") {
  const TokenizerPtr t = make_byte_tokenizer(false);
  StreamDecoder decoder(t);
  std::string shown;
  const std::string text = "a\u00e9\u6f22\U0001F600";
  for (const int32_t id : t->encode(text)) {
    const std::string part = decoder.push(id);
    CHECK(utf8::find_invalid(part) == std::string::npos);
    shown += part;
  }
  CHECK(shown == text);
  CHECK(decoder.push(0xE6).empty());
  CHECK(decoder.finish() == "\xE6");
  CHECK(decoder.push('b') == "b");
}

TEST_CASE("utf8 finds what is invalid and where characters end") {
  CHECK(utf8::find_invalid("aé漢\U0001F600") == std::string::npos);
  for (const std::string bad :
       {"\xC0\x80", "\xE0\x80\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\x80", "\xE6\xBC", "\xFF"})
    CHECK(utf8::find_invalid("ab" + bad) == 2);
  CHECK(utf8::complete_prefix("ab\xE6\xBC") == 2);
  CHECK(utf8::complete_prefix("ab\xE6\xBC\xA2") == 5);
  CHECK(utf8::complete_prefix("ab\xFF") == 3);
  CHECK(utf8::count("aé漢") == 3);
  CHECK(utf8::prefix_of("aé漢b", 2) == 3);
  CHECK(utf8::prefix_of("aé", 5) == 3);
}

TEST_CASE("sha256 gives the published digests") {
  CHECK(sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(sha256(std::string(1000000, 'a')) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  for (size_t n = 50; n < 130; ++n) {  // pieces of any size give the digest of the whole
    const std::string text(n, 'x');
    Sha256 pieces;
    pieces.update(text.substr(0, n / 3));
    pieces.update(text.substr(n / 3));
    CHECK(pieces.hex() == sha256(text));
  }
}

#include "data/token_store.h"

#include <algorithm>
#include <random>

#include "data/hdf5.h"
#include "data/inspect.h"
#include "tests/data/temp_dir.h"
#include "tests/testing/catch.h"

using namespace krait;
using namespace krait::data;
using krait::testing::read_file;
using krait::testing::TempDir;
using krait::testing::write_file;

namespace {

std::vector<int32_t> some_ids(int64_t n, int32_t vocabulary) {
  std::vector<int32_t> ids(static_cast<size_t>(n));
  std::mt19937 random(7);
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % static_cast<uint32_t>(vocabulary));
  return ids;
}

TokenizerPtr large_tokenizer() {
  std::vector<char32_t> alphabet;
  for (char32_t c = 0x10000; c < 0x10000 + 70000; ++c) alphabet.push_back(c);
  return make_char_tokenizer(std::move(alphabet), false);
}

std::vector<int32_t> write_store(const std::string& path, const Tokenizer& tokenizer, int64_t n) {
  const auto ids = some_ids(n, static_cast<int32_t>(tokenizer.vocab_size()));
  TokenStoreWriter writer(path, tokenizer, tokenizer.eos_id());
  for (int64_t at = 0; at < n; at += n / 3 + 1) {
    writer.begin_document("train");
    writer.append("train",
                  std::span(ids).subspan(static_cast<size_t>(at), static_cast<size_t>(std::min(n / 3 + 1, n - at))));
  }
  writer.begin_document("train");  // without tokens: forgotten
  writer.append("valid", std::span(ids).first(5));
  writer.set_counts("train", {1234, 1200, 100, 10});
  writer.finish("a.txt", std::string(64, 'f'));
  return ids;
}

std::vector<int32_t> all_of(const Tokens& tokens) {
  std::vector<int32_t> out(static_cast<size_t>(tokens.size()));
  tokens.read(0, out);
  return out;
}

// A good store with one thing changed.
template <class Change>
std::string broken(const TempDir& dir, Change&& change) {
  const std::string path = dir / "broken.h5";
  hdf5::File file = hdf5::File::create(path);
  file.set_attribute("format", "krait.token_store");
  file.set_attribute("format_version", 1);
  file.set_attribute("tokenizer", "byte");
  file.set_attribute("vocab_size", 256);
  file.set_attribute("eos_id", -1);
  file.set_attribute("created_by", "test");
  file.set_attribute("source", "a.txt");
  file.set_attribute("source_sha256", "");
  file.write_bytes("tokenizer", make_byte_tokenizer(false)->serialize());
  {
    hdf5::Group train = file.create_group("train");
    for (const char* name : {"bytes", "characters", "words", "lines"}) train.set_attribute(name, 10);
    change(file, train);
    if (!train.has("tokens")) train.write("tokens", std::span<const uint16_t>(std::vector<uint16_t>(10, 65)), {10});
    if (!train.has("documents")) train.write("documents", std::span<const int64_t>(std::vector<int64_t>{0, 4}), {2});
  }
  file.close();
  return error_of([&] { (void)all_of(*TokenStore::open(path)->split("train")); });
}

}  // namespace

TEST_CASE("a store gives back tokens, documents, counts and the tokenizer") {
  const TempDir dir;
  for (const int64_t max_memory : {int64_t{0}, int64_t{1} << 30}) {
    for (const TokenizerPtr& tokenizer : {make_byte_tokenizer(true), large_tokenizer()}) {
      const int64_t n = 300001;
      const auto ids = write_store(dir / "a.h5", *tokenizer, n);
      const TokenStorePtr store = TokenStore::open(dir / "a.h5", {.max_memory_bytes = max_memory});
      CHECK(store->splits() == std::vector<std::string>{"train", "valid"});
      CHECK(store->vocab_size() == tokenizer->vocab_size());
      CHECK(store->eos_id() == tokenizer->eos_id());
      CHECK(store->tokenizer()->serialize() == tokenizer->serialize());
      CHECK(store->source() == "a.txt");
      const TokensPtr train = store->split("train");
      CHECK(train->size() == n);
      CHECK(all_of(*train) == ids);
      std::vector<int32_t> part(1000);
      train->read(65000, part);
      CHECK(std::equal(part.begin(), part.end(), ids.begin() + 65000));
      const auto starts = train->documents();
      REQUIRE(starts.size() == 3);
      CHECK(starts[1] == 100001);
      CHECK(train->document_of(0) == 0);
      CHECK(train->document_of(100000) == 0);
      CHECK(train->document_of(100001) == 1);
      CHECK(train->document_of(n - 1) == 2);
      CHECK(train->counts().bytes == 1234);
      CHECK(store->split("valid")->size() == 5);
      CHECK(contains(error_of([&] { (void)store->split("test"); }), "there is no split 'test'; it has train, valid"));
      CHECK(contains(inspect(dir / "a.h5", 3), "verified"));
    }
  }
}

TEST_CASE("text in memory reads like a store") {
  const TokensPtr tokens = encode_text("two words\n", *make_byte_tokenizer(false), "a.txt");
  CHECK(tokens->size() == 10);
  CHECK(tokens->documents().size() == 1);
  CHECK(tokens->counts().words == 2);
  CHECK(tokens->counts().lines == 1);
  CHECK(contains(error_of([] { (void)encode_text("b", *make_char_tokenizer({U'a'}, false), "a.txt"); }),
                 "a.txt: char tokenizer"));
}

TEST_CASE("what is not a store is refused by name") {
  const TempDir dir;
  CHECK(contains(error_of([&] { (void)TokenStore::open(dir / "no.h5"); }), "no such file; expected a token store"));
  write_file(dir / "text.h5", "Once upon a time");
  CHECK(contains(error_of([&] { (void)TokenStore::open(dir / "text.h5"); }), "krait data prepare"));
  write_file(dir / "empty.h5", "");
  CHECK(contains(error_of([&] { (void)TokenStore::open(dir / "empty.h5"); }), "is not an HDF5 file"));
  {
    hdf5::File file = hdf5::File::create(dir / "other.h5");
    file.close();
  }
  CHECK(contains(error_of([&] { (void)TokenStore::open(dir / "other.h5"); }), "is an HDF5 file but not a token store"));
}

TEST_CASE("each part of a store that is wrong is named") {
  const TempDir dir;
  using hdf5::File;
  using hdf5::Group;
  const auto ids16 = [](std::vector<uint16_t> ids) { return ids; };
  CHECK(contains(broken(dir, [](File& f, Group&) { f.set_attribute("format_version", 2); }),
                 "format version 2, this build reads 1"));
  CHECK(contains(broken(dir, [](File& f, Group&) { f.set_attribute("vocab_size", 300); }),
                 "the tokenizer itself is byte with 256"));
  CHECK(contains(broken(dir, [](File& f, Group&) { f.set_attribute("eos_id", 256); }), "eos_id 256 is outside"));
  CHECK(contains(broken(dir, [](File& f, Group&) { f.set_attribute("source", 3); }),
                 "the attribute source is not a string"));
  CHECK(contains(broken(dir, [](File&, Group& t) { t.set_attribute("bytes", -1); }), "negative counts"));
  CHECK(contains(broken(dir,
                        [&](File&, Group& t) {
                          t.write("tokens", std::span<const uint16_t>(ids16({65, 256})), {2});
                        }),
                 "document 1 starts at 4, but there are 2 tokens"));
  CHECK(contains(broken(dir,
                        [&](File&, Group& t) {
                          t.write("tokens", std::span<const uint16_t>(ids16({65, 256, 3, 4, 5})), {5});
                        }),
                 "split train: token 256 at position 1 is outside the vocabulary of 256"));
  CHECK(contains(
      broken(dir, [](File&, Group& t) { t.write("tokens", std::span<const float>(std::vector<float>(10)), {10}); }),
      "/train/tokens: expected uint16 in one dimension (vocabulary 256), found float32 in 1"));
  CHECK(contains(broken(dir,
                        [&](File&, Group& t) {
                          t.write("tokens", std::span<const uint16_t>(ids16({1, 2, 3, 4})), {2, 2});
                        }),
                 "found uint16 in 2"));
  const auto with_documents = [&](std::vector<int64_t> starts) {
    return broken(dir, [&](File&, Group& t) {
      t.write("documents", std::span<const int64_t>(starts), {static_cast<int64_t>(starts.size())});
    });
  };
  CHECK(contains(with_documents({1, 4}), "the first document does not start at token 0"));
  CHECK(contains(with_documents({}), "the first document does not start at token 0"));
  CHECK(contains(with_documents({0, 4, 4}), "document 2 starts at 4, not after document 1 at 4"));
  CHECK(contains(with_documents({0, 10}), "document 1 starts at 10, but there are 10 tokens"));
  CHECK(contains(
      broken(dir, [](File&, Group& t) { t.write("documents", std::span<const float>(std::vector<float>{0}), {1}); }),
      "expected document offsets of int64"));
}

TEST_CASE("a store cut short anywhere is refused") {
  const TempDir dir;
  write_store(dir / "a.h5", *make_byte_tokenizer(true), 200000);
  const std::string whole = read_file(dir / "a.h5");
  for (size_t i = 0; i < 40; ++i) {
    const size_t size = i < 20 ? i * 101 : whole.size() * (i - 19) / 21 - 1;
    CAPTURE(size);
    write_file(dir / "cut.h5", whole.substr(0, size));
    CHECK(contains(error_of([&] { (void)inspect(dir / "cut.h5"); }), "cut.h5"));
  }
}

TEST_CASE("a flipped byte is found, or changes nothing") {
  const TempDir dir;
  write_store(dir / "a.h5", *make_byte_tokenizer(true), 20000);
  const std::string whole = read_file(dir / "a.h5"), report = inspect(dir / "a.h5");
  std::mt19937 random(11);
  int64_t found = 0, silent = 0;
  // A byte of every four of the first 4 KB, where most metadata lie, and a sample of the rest.
  for (size_t i = 0; i < 1024 + 200; ++i) {
    const size_t at = i < 1024 ? 4 * i + random() % 4 : random() % whole.size();
    std::string damaged = whole;
    damaged[at] = static_cast<char>(damaged[at] ^ (1 << (random() % 8)));
    write_file(dir / "a.h5", damaged);
    try {
      const std::string now = inspect(dir / "a.h5");
      silent += now != report;
    } catch (const Error&) {
      ++found;
    }
  }
  CHECK(silent == 0);
  CHECK(found > 300);
}

#include "data/prepare.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <functional>
#include <thread>

#include "core/parallel.h"
#include "data/dataset.h"
#include "data/documents.h"
#include "data/inspect.h"
#include "data/sha256.h"
#include "data/split_plan.h"
#include "data/token_store.h"
#include "tests/data/temp_dir.h"
#include "tests/testing/catch.h"

using namespace krait;
using namespace krait::data;
using krait::testing::shared_data;
using krait::testing::TempDir;
using krait::testing::write_file;

namespace {

PrepareOptions options(const std::string& input, const std::string& output) {
  PrepareOptions o;
  o.inputs = {input};
  o.output = output;
  o.quiet = true;
  return o;
}

std::vector<int32_t> ids_of(const TokenStore& store, const std::string& split) {
  std::vector<int32_t> ids(static_cast<size_t>(store.split(split)->size()));
  store.split(split)->read(0, ids);
  return ids;
}

std::string text_of(const TokenStore& store, const std::string& split) {
  return store.tokenizer()->decode(ids_of(store, split));
}

// The documents of a split, decoded.
std::vector<std::string> documents_of(const TokenStore& store, const std::string& split) {
  const auto ids = ids_of(store, split);
  const auto starts = store.split(split)->documents();
  std::vector<std::string> out;
  for (size_t i = 0; i < starts.size(); ++i) {
    const auto end = i + 1 < starts.size() ? starts[i + 1] : static_cast<int64_t>(ids.size());
    out.push_back(store.tokenizer()->decode(
        std::span(ids).subspan(static_cast<size_t>(starts[i]), static_cast<size_t>(end - starts[i]))));
  }
  return out;
}

int64_t files_in(const TempDir& dir) {
  return std::distance(std::filesystem::directory_iterator(dir.path()), std::filesystem::directory_iterator());
}

// Real text where the checkout has it, else lines of words.
std::string some_text(size_t bytes) {
  std::string text;
  if (const std::string path = shared_data("tinyshakespeare/input.txt"); !path.empty()) text = testing::read_file(path);
  for (size_t i = 0; text.size() < bytes; ++i)
    text += "line " + std::to_string(i * i % 977) + (i % 3 ? " of many words, and a café" : " short") + "\n";
  return text.substr(0, bytes - (text[bytes] < 0));
}

// Runs the body in a process of its own, which is asked to stop once `stop` says so; the exit status, or minus the signal.
template <class Body>
int in_child(Body&& body, rusage* usage = nullptr, const std::function<bool()>& stop = {}) {
  const pid_t child = ::fork();
  if (child == 0) {
    int status = 0;
    set_num_threads(1);  // OpenMP's threads do not survive a fork
    try {
      body();
    } catch (const Error& error) {
      status = contains(error.what(), "interrupted") ? 3 : 4;
      std::fprintf(stderr, "%s\n", error.what());
    }
    ::_exit(status);
  }
  if (stop) {
    for (int ms = 0; ms < 60'000 && !stop(); ++ms) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    ::kill(child, SIGTERM);
  }
  int status = 0;
  rusage own{};
  ::wait4(child, &status, 0, usage ? usage : &own);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

}  // namespace

TEST_CASE("tiny Shakespeare in characters is nanoGPT's data") {
  const std::string path = shared_data("tinyshakespeare/input.txt");
  if (path.empty()) {
    WARN("shared data not found: set KRAIT_DATA_DIR");
    return;
  }
  const TempDir dir;
  PrepareOptions o = options(path, dir / "a.h5");
  o.tokenizer = "char";
  const PrepareSummary summary = prepare(o);
  CHECK(summary.sha256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed");
  CHECK(summary.vocab_size == 65);
  CHECK(summary.eos_id == -1);
  REQUIRE(summary.splits.size() == 2);
  CHECK(summary.splits[0].tokens == 1003854);
  CHECK(summary.splits[1].tokens == 111540);
  CHECK(summary.splits[1].bytes == 111540);
  const TokenStorePtr store = TokenStore::open(dir / "a.h5");
  CHECK(store->tokenizer()->token_bytes(0) == "\n");
  CHECK(store->tokenizer()->token_bytes(1) == " ");
  CHECK(store->tokenizer()->token_bytes(64) == "z");
  CHECK((text_of(*store, "train") + text_of(*store, "valid") == testing::read_file(path)));
  CHECK(text_of(*store, "valid").starts_with("?\n\nGREMIO:\nGood morrow"));
  CHECK(contains(to_string(summary), "1,003,854"));
  CHECK(contains(inspect(dir / "a.h5"), "First Citizen"));
}

TEST_CASE("WikiText-2's test text has the published number of words and lines") {
  const std::string gz = shared_data("wikitext-2/wiki.test.tokens.gz");
  if (gz.empty()) return;
  const TempDir dir;
  REQUIRE(std::system(("gzip -dc '" + gz + "' > " + (dir / "test.txt")).c_str()) == 0);
  PrepareOptions o = options(dir / "test.txt", dir / "a.h5");
  o.valid = 0.0;
  const PrepareSummary summary = prepare(o);
  CHECK(summary.splits[0].words == 241211);
  CHECK(summary.splits[0].lines == 4358);
  CHECK(summary.splits[0].bytes == 1256449);
}

TEST_CASE("one text is cut by position and kept whole, for every tokenizer") {
  const TempDir dir;
  const std::string text = some_text(200000);
  write_file(dir / "a.txt", text);
  for (const std::string name : {"byte", "char", "sentencepiece"}) {
    CAPTURE(name);
    PrepareOptions o = options(dir / "a.txt", dir / (name + ".h5"));
    o.tokenizer = name;
    o.vocab_size = 500;
    o.valid = 0.2;
    o.test = 0.1;
    const PrepareSummary summary = prepare(o);
    REQUIRE(summary.splits.size() == 3);
    const auto n = static_cast<double>(name == "byte" ? text.size()
                                                      : static_cast<size_t>(summary.splits[0].characters +
                                                                            summary.splits[1].characters +
                                                                            summary.splits[2].characters));
    const auto units = [&](size_t s) {
      return name == "byte" ? summary.splits[s].bytes : summary.splits[s].characters;
    };
    CHECK(units(0) == static_cast<int64_t>(n * (1 - 0.2 - 0.1)));
    CHECK(units(0) + units(1) == static_cast<int64_t>(n * (1 - 0.1)));
    const TokenStorePtr store = TokenStore::open(o.output);
    CHECK((text_of(*store, "train") + text_of(*store, "valid") + text_of(*store, "test") == text));
    CHECK(store->split("train")->documents().size() == 1);
    if (name == "sentencepiece") CHECK(summary.splits[0].tokens < 0.8 * static_cast<double>(summary.splits[0].bytes));
  }
}

TEST_CASE("json lines are documents, each in one split and ended by eos") {
  const TempDir dir;
  std::string lines;
  std::vector<std::string> texts;
  for (int i = 0; i < 200; ++i) {
    texts.push_back("doc " + std::to_string(i) + " \u6f22\n\"x\"");
    lines += R"({"id": )" + std::to_string(i) + R"(, "body": "doc )" + std::to_string(i) + " \\u6f22\\n\\\"x\\\"\"}\n";
    if (i % 50 == 0) lines += "\n{\"id\": -1, \"body\": \"\"}\n";  // blank lines and empty documents are left out
  }
  write_file(dir / "a.jsonl", lines);
  for (const std::string name : {"byte", "char", "sentencepiece"}) {
    CAPTURE(name);
    PrepareOptions o = options(dir / "a.jsonl", dir / (name + ".h5"));
    o.field = "body";
    o.tokenizer = name;
    o.vocab_size = 300;
    o.test = 0.1;
    const PrepareSummary summary = prepare(o);
    const TokenStorePtr store = TokenStore::open(o.output);
    CHECK(store->eos_id() >= 0);
    std::vector<std::string> all;
    for (const std::string split : {"train", "valid", "test"}) {
      const auto documents = documents_of(*store, split);
      CHECK(documents.size() > (split == "train" ? 130 : 5));
      all.insert(all.end(), documents.begin(), documents.end());
      const auto ids = ids_of(*store, split);
      CHECK(std::count(ids.begin(), ids.end(), store->eos_id()) == static_cast<int64_t>(documents.size()));
      CHECK(ids.back() == store->eos_id());
    }
    std::sort(all.begin(), all.end());
    std::sort(texts.begin(), texts.end());
    CHECK(all == texts);
  }
}

TEST_CASE("files of a directory, and parts between separator lines, are documents") {
  const TempDir dir;
  std::filesystem::create_directories(dir / "texts/sub");
  write_file(dir / "texts/b.txt", "second\n");
  write_file(dir / "texts/a.txt", "first\n\f\nstill \f a file\n\f\n\f\nlast, no line end");
  write_file(dir / "texts/sub/c.txt", "\f\n");
  write_file(dir / "texts/.hidden", "no");
  PrepareOptions o = options(dir / "texts", dir / "a.h5");
  o.valid = 0.0;
  o.document_separator = "\\f";
  prepare(o);
  TokenStorePtr store = TokenStore::open(dir / "a.h5");
  CHECK(documents_of(*store, "train") ==
        std::vector<std::string>{"first\n", "still \f a file\n", "last, no line end", "second\n"});
  CHECK(store->split("train")->counts().bytes == 6 + 15 + 17 + 7);
  o.document_separator = "";
  o.output = dir / "b.h5";
  o.eos = false;
  prepare(o);
  store = TokenStore::open(dir / "b.h5");
  CHECK(documents_of(*store, "train").size() == 3);
  CHECK(store->eos_id() == -1);
  CHECK(store->vocab_size() == 256);
  o.output = dir / "texts/c.h5";  // among the inputs, which it is no part of
  prepare(o);
  CHECK(documents_of(*TokenStore::open(o.output), "train").size() == 3);
}

TEST_CASE("separators are found wherever blocks are cut") {
  // Documents of many lengths over several 4 MiB blocks, some without any line end inside.
  const TempDir dir;
  std::string text;
  std::vector<size_t> sizes;
  for (size_t i = 0; text.size() < (size_t{13} << 20); ++i) {
    std::string document(i % 7 == 3 ? size_t{5} << 20 : 1 + i * 7919 % 100000, static_cast<char>('a' + i % 26));
    if (i % 2) document[document.size() / 2] = '\n';
    sizes.push_back(document.size() + 1);
    text += document + "\n---\n";
  }
  write_file(dir / "a.txt", text);
  PrepareOptions o = options(dir / "a.txt", dir / "a.h5");
  o.valid = 0.0;
  o.document_separator = "---";
  prepare(o);
  const TokenStorePtr store = TokenStore::open(dir / "a.h5");
  std::vector<size_t> found;
  for (const std::string& document : documents_of(*store, "train")) found.push_back(document.size());
  CHECK(found == sizes);
}

TEST_CASE("validation files are taken whole, with the characters of all files") {
  const TempDir dir;
  write_file(dir / "a.txt", "abc\n");
  write_file(dir / "b.txt", "cde\n");
  write_file(dir / "c.txt", "xé\n");
  PrepareOptions o = options(dir / "a.txt", dir / "a.h5");
  o.tokenizer = "char";
  o.valid_files = {dir / "b.txt"};
  o.test_files = {dir / "c.txt"};
  const PrepareSummary summary = prepare(o);
  const TokenStorePtr store = TokenStore::open(dir / "a.h5");
  CHECK(text_of(*store, "train") == "abc\n");
  CHECK(text_of(*store, "valid") == "cde\n");
  CHECK(text_of(*store, "test") == "xé\n");
  CHECK(summary.vocab_size == 8);
  CHECK(store->eos_id() == -1);
}

TEST_CASE("further data take the tokenizer of a store") {
  const TempDir dir;
  write_file(dir / "a.txt", "hello world\n");
  write_file(dir / "b.txt", "hold\n");
  write_file(dir / "c.txt", "held\nheld!\n");
  PrepareOptions o = options(dir / "a.txt", dir / "a.h5");
  o.tokenizer = "char";
  prepare(o);
  o = options(dir / "b.txt", dir / "b.h5");
  o.valid = 0.0;
  o.tokenizer_from = dir / "a.h5";
  CHECK(prepare(o).vocab_size == 9);
  o.inputs = {dir / "c.txt"};
  o.output = dir / "c.h5";
  const std::string message = error_of([&] { prepare(o); });
  CHECK(contains(message, "c.txt: byte 0 and following: char tokenizer: the character '!' (U+0021) at byte 9"));
  o.eos = true;
  CHECK(contains(error_of([&] { prepare(o); }), "has no end-of-document token"));
}

TEST_CASE("the same options give the same file, byte for byte") {
  const TempDir dir;
  write_file(dir / "a.txt", some_text(50000));
  PrepareOptions o = options(dir / "a.txt", dir / "a.h5");
  o.tokenizer = "sentencepiece";
  o.vocab_size = 400;
  prepare(o);
  const std::string first = testing::read_file(dir / "a.h5");
  o.overwrite = true;
  prepare(o);
  CHECK((testing::read_file(dir / "a.h5") == first));
}

TEST_CASE("documents keep their split by hash, and no share stays empty") {
  for (const int64_t n : {3, 4, 10, 1000}) {
    for (uint64_t seed = 0; seed < 20; ++seed) {
      const SplitPlan plan(n, 0.1, 0.1, seed);
      int64_t count[3] = {};
      for (int64_t i = 0; i < n; ++i) ++count[static_cast<int>(plan.of(i))];
      CHECK((count[0] > 0 && count[1] > 0 && count[2] > 0));
      if (n == 1000) CHECK((std::abs(count[1] - 100) < 40 && std::abs(count[2] - 100) < 40));
    }
  }
  const SplitPlan small(500, 0.1, 0.1, 1), large(1000, 0.1, 0.1, 1);
  for (int64_t i = 0; i < 500; ++i) CHECK(small.of(i) == large.of(i));
  CHECK(contains(error_of([] { (void)SplitPlan(2, 0.1, 0.1, 0); }), "2 documents cannot be shared over 3 splits"));
}

TEST_CASE("bad input gives one error and no file") {
  const TempDir dir;
  const auto refused = [&](const std::string& name, const std::string& text, auto&& change) {
    write_file(dir / name, text);
    PrepareOptions o = options(dir / name, dir / "out.h5");
    change(o);
    const std::string message = error_of([&] { prepare(o); });
    CHECK(files_in(dir) == 1);
    std::filesystem::remove(dir / name);
    return message;
  };
  const auto nothing = [](PrepareOptions&) {};
  CHECK(contains(refused("a.jsonl", "{\"text\": \"a\"}\n{\"text\": 3}\n", nothing),
                 "a.jsonl:2: the field 'text' is a number"));
  CHECK(contains(refused("a.jsonl", "\n{\"title\": \"a\", \"body\": \"b\"}\n", nothing),
                 "a.jsonl:2: has no field 'text'; it has body, title"));
  CHECK(contains(refused("a.jsonl", "{\"text\": \"a\"\n", nothing), "a.jsonl:1: is not JSON"));
  CHECK(contains(refused("a.jsonl", "[1]\n", nothing), "a.jsonl:1: is an array"));
  CHECK(contains(refused("a.txt", "", nothing), "a.txt: no text found"));
  CHECK(contains(refused("a.txt", "\x1F\x8B\x08 packed", nothing), "a.txt: is compressed (gzip), and its bytes are no text"));
  CHECK(contains(refused("a.txt", "text", [](PrepareOptions& o) { o.test_files = o.inputs; }), "a.txt: is text of train and of test; leave it out of one"));
  CHECK(contains(refused("a.txt", "x", nothing), "too little text to train on (1 bytes)"));
  CHECK(contains(refused("a.txt", "good \xE9t\xE9\n", [](PrepareOptions& o) { o.tokenizer = "char"; }),
                 "a.txt: byte 5: 0xE9 is not UTF-8"));
  CHECK(contains(refused("a.txt", "text", [](PrepareOptions& o) { o.inputs.push_back("/no/such.txt"); }),
                 "/no/such.txt: no such file"));
  const TempDir elsewhere;
  std::filesystem::create_symlink("loop", elsewhere / "loop");  // there, but not to be read
  CHECK(contains(refused("a.txt", "text", [&](PrepareOptions& o) { o.inputs.push_back(elsewhere / "loop"); }),
                 "loop: cannot be read: Too many levels of symbolic links"));
  CHECK(contains(refused("a.txt", "text", [](PrepareOptions& o) { o.tokenizer = "bpe"; }),
                 "choose byte, char, sentencepiece or ids"));
  CHECK(contains(refused("a.txt", "text",
                         [](PrepareOptions& o) {
                           o.valid = 0.6;
                           o.test = 0.4;
                         }),
                 "leave something to train"));
  CHECK(
      contains(refused("a.txt", "text", [](PrepareOptions& o) { o.document_separator = "\\q"; }), "after a backslash"));
  CHECK(contains(refused("a.txt", "text", [](PrepareOptions& o) { o.tokenizer_from = o.inputs[0]; }),
                 "is not an HDF5 file"));
  CHECK(contains(refused("a.txt", "text", [](PrepareOptions& o) { o.inputs.clear(); }), "no input"));
  CHECK(contains(refused("a.txt", some_text(9999),
                         [](PrepareOptions& o) {
                           o.tokenizer = "sentencepiece";
                           o.vocab_size = 259;
                         }),
                 "too small"));
  CHECK(contains(refused("a.txt", "text", [&](PrepareOptions& o) { o.output = o.inputs[0]; }), "exists already"));
  CHECK(contains(refused("a.txt", "text",
                         [&](PrepareOptions& o) {
                           o.output = o.inputs[0];
                           o.overwrite = true;
                         }),
                 "both input and output"));
}

TEST_CASE("an existing output survives a failure") {
  const TempDir dir;
  write_file(dir / "a.txt", "some text to keep");
  prepare(options(dir / "a.txt", dir / "a.h5"));
  const std::string before = testing::read_file(dir / "a.h5");
  CHECK(contains(error_of([&] { prepare(options(dir / "a.txt", dir / "a.h5")); }), "a.h5: exists already"));
  write_file(dir / "bad.jsonl", "{");
  PrepareOptions o = options(dir / "bad.jsonl", dir / "a.h5");
  o.overwrite = true;
  error_of([&] { prepare(o); });
  CHECK((testing::read_file(dir / "a.h5") == before));
  CHECK(files_in(dir) == 3);
}

TEST_CASE("a disk that fills up is one error that leaves nothing") {
  const TempDir dir;
  write_file(dir / "a.txt", some_text(1000000));
  const int status = in_child([&] {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{300000, 300000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    prepare(options(dir / "a.txt", dir / "a.h5"));
  });
  CHECK(status == 4);
  CHECK(files_in(dir) == 1);
}

TEST_CASE("large input takes constant memory, and a signal leaves nothing") {
  const TempDir dir;
  // 60 MB here; KRAIT_LARGE=1 makes it 600 MB.
  const size_t copies = std::getenv("KRAIT_LARGE") ? 600 : 60;
  {
    const std::string part = some_text(1000000);
    std::ofstream out(dir / "large.txt", std::ios::binary);
    for (size_t i = 0; i < copies; ++i) out << part << "\n---\n";
  }
  PrepareOptions o = options(dir / "large.txt", dir / "large.h5");
  o.tokenizer = "char";
  o.document_separator = "---";
  rusage usage{};
  CHECK(in_child([&] { prepare(o); }, &usage) == 0);
  // The child begins with this process's resident pages; what it adds must not grow with the input.
  INFO("peak RSS " << usage.ru_maxrss / 1024 << " MB");
#ifndef __SANITIZE_ADDRESS__  // which keeps what was freed
  CHECK(usage.ru_maxrss < 200 * 1024);
#endif
  const TokenStorePtr store = TokenStore::open(dir / "large.h5", {.max_memory_bytes = 0});
  CHECK(store->split("train")->size() + store->split("valid")->size() >= static_cast<int64_t>(copies) * 950000);
  // Random crops of a split that is not kept in memory.
  const auto crops =
      random_crops(store->split("train"), {.context = 256, .batch_size = 8, .documents = Documents::pack});
  CHECK(crops->get(3).n_targets >= 8 * 256 - 8);

  o.overwrite = true;
  const std::string before = testing::read_file(dir / "large.h5");
  CHECK(in_child([&] { prepare(o); }, nullptr, [&] { return files_in(dir) == 3; }) == 3);
  CHECK(files_in(dir) == 2);
  CHECK((testing::read_file(dir / "large.h5") == before));
}

TEST_CASE("standard input and pipes are read through a copy that goes away") {
  const TempDir dir;
  std::filesystem::create_directory(dir / "out");
  const int status = in_child([&] {
    int ends[2];
    if (::pipe(ends) != 0) ::_exit(9);
    const std::string text = "from a pipe\n";
    if (::write(ends[1], text.data(), text.size()) != static_cast<ssize_t>(text.size())) ::_exit(9);
    ::close(ends[1]);
    ::dup2(ends[0], STDIN_FILENO);
    PrepareOptions o = options("-", dir / "out/a.h5");
    o.valid = 0.0;
    prepare(o);
  });
  CHECK(status == 0);
  const TokenStorePtr store = TokenStore::open(dir / "out/a.h5");
  CHECK(text_of(*store, "train") == "from a pipe\n");
  CHECK(store->source() == "standard input");
  CHECK(std::distance(std::filesystem::directory_iterator(dir / "out"), std::filesystem::directory_iterator()) == 1);
}

namespace {

std::string little_endian(const std::vector<uint32_t>& ids, int width) {
  std::string out;
  for (const uint32_t id : ids)
    for (int i = 0; i < width; ++i) out.push_back(static_cast<char>(id >> (8 * i) & 0xFF));
  return out;
}

PrepareOptions of_ids(const std::string& input, const std::string& output, const std::string& format) {
  PrepareOptions o = options(input, output);
  o.tokenizer = "ids";
  o.format = format;
  return o;
}

}  // namespace

TEST_CASE("ids of another program become a store: cut by position, by documents, or by files") {
  const TempDir dir;
  std::vector<uint32_t> ids;
  for (uint32_t i = 0; i < 1000; ++i) ids.push_back(i * 7919 % 50000);
  for (const auto& [format, width] : {std::pair("uint16", 2), std::pair("uint32", 4)}) {
    write_file(dir / "a.bin", "head" + little_endian(ids, width));
    PrepareOptions o = of_ids(dir / "a.bin", dir / (std::string(format) + ".h5"), format);
    o.vocab_size = width == 2 ? 50257 : 100000;
    o.skip_bytes = 4;
    o.test = 0.2;
    const PrepareSummary summary = prepare(o);
    CHECK(summary.tokenizer == "ids");
    CHECK(summary.sha256 == sha256_file(dir / "a.bin"));
    const auto store = TokenStore::open(o.output);
    CHECK(store->vocab_size() == *o.vocab_size);
    CHECK(store->eos_id() == -1);
    CHECK((store->split("train")->size() == 700 && store->split("valid")->size() == 100 && store->split("test")->size() == 200));
    std::vector<int32_t> all = ids_of(*store, "train");
    for (const char* split : {"valid", "test"})
      for (const int32_t id : ids_of(*store, split)) all.push_back(id);
    CHECK(std::equal(all.begin(), all.end(), ids.begin(), ids.end(), [](int32_t a, uint32_t b) { return static_cast<uint32_t>(a) == b; }));
    CHECK(store->split("train")->counts().bytes == 0);
  }
  // Documents that end with an id; a last one without it; a file held out; the vocabulary from the ids.
  write_file(dir / "train.bin", little_endian({1, 2, 0, 3, 0, 0, 4, 5}, 2));
  write_file(dir / "valid.bin", little_endian({6, 0, 11, 0}, 2));
  PrepareOptions o = of_ids(dir / "train.bin", dir / "documents.h5", "uint16");
  o.valid_files = {dir / "valid.bin"};
  o.eos_id = 0;
  prepare(o);
  const auto store = TokenStore::open(o.output);
  CHECK(store->vocab_size() == 12);
  CHECK(store->eos_id() == 0);
  CHECK(documents_of(*store, "train") == std::vector<std::string>{"1 2 0 ", "3 0 ", "0 ", "4 5 "});
  CHECK(documents_of(*store, "valid") == std::vector<std::string>{"6 0 ", "11 0 "});
  CHECK(contains(inspect(o.output, 4), "ids  1 2 0 3\n"));
  // Further data for the same model.
  PrepareOptions more = of_ids(dir / "valid.bin", dir / "more.h5", "uint16");
  more.tokenizer_from = o.output;
  more.valid = 0;
  prepare(more);
  CHECK(TokenStore::open(more.output)->tokenizer()->serialize() == store->tokenizer()->serialize());
}

TEST_CASE("ids that are none: the first bad one is named with its place, and nothing is written") {
  const TempDir dir;
  const auto refused = [&](const std::string& bytes, auto&& change) {
    write_file(dir / "a.bin", bytes);
    PrepareOptions o = of_ids(dir / "a.bin", dir / "out.h5", "uint16");
    change(o);
    const std::string message = error_of([&] { prepare(o); });
    CHECK_FALSE(std::filesystem::exists(dir / "out.h5"));
    return message;
  };
  const std::string good = little_endian({1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 2);
  CHECK(contains(refused(good, [](auto& o) { o.vocab_size = 8; o.skip_bytes = 2; }),
                 "a.bin: id 8 at place 6 (byte 14) is not below the vocabulary of 8"));
  CHECK(contains(refused(good + "x", [](auto&) {}), "a.bin: 21 bytes are not whole ids of 2 bytes"));
  CHECK(contains(refused("", [](auto&) {}), "a.bin: 0 bytes, no ids"));
  CHECK(contains(refused(good, [](auto& o) { o.format = "uint32"; o.vocab_size = 65536; }), "a.bin: id 131073 at place 0 (byte 0)"));
  CHECK(contains(refused(little_endian({1, 0xFFFFFFFF}, 4), [](auto& o) { o.format = "uint32"; }), "id 4294967295 at place 1 (byte 4)"));
  CHECK(contains(refused(good, [](auto& o) { o.eos_id = 8; o.vocab_size = 8; }), "a vocabulary of 8 with end of document 8"));
  CHECK(contains(refused(good, [](auto& o) { o.tokenizer = "byte"; }), "--format uint16 holds ids, not text: --tokenizer ids"));
  CHECK(contains(refused(good, [](auto& o) { o.format = "text"; }), "--tokenizer ids takes the ids of another program: --format uint16 or uint32"));
  PrepareOptions o = of_ids(dir / "a.bin", dir / "ids.h5", "uint16");
  prepare(o);
  CHECK(contains(refused("some text", [&](auto& p) { p = options(dir / "a.bin", dir / "out.h5"); p.tokenizer_from = dir / "ids.h5"; }),
                 "ids.h5: holds ids of a tokenizer that is not here, which cannot encode text"));
}

#include "data/fetch.h"

#include <algorithm>
#include <array>

#include "data/child_process.h"
#include "data/sha256.h"
#include "tests/data/temp_dir.h"
#include "tests/testing/catch.h"

using namespace krait;
using namespace krait::data;
using krait::testing::read_file;
using krait::testing::shared_data;
using krait::testing::TempDir;
using krait::testing::write_file;

namespace {

const std::string kText = [] {
  std::string text;
  for (int i = 0; i < 20000; ++i) text += fmt::format("line {}\n", i);
  return text;
}();

std::string run(const std::vector<std::string>& arguments) {
  std::string out;
  const ProcessResult result = run_process(arguments, [&](std::string_view piece) { out += piece; });
  REQUIRE(result.status == 0);
  return out;
}

// A set of one plain file.
FetchSet plain_set(const std::string& name = "text.txt") {
  return {"test", "folder", "free", {{.file = name, .urls = {}, .sha256 = sha256(kText), .members = {{name, "", sha256(kText)}}}}};
}

FetchOptions options(const TempDir& dir, const std::string& mirror) {
  return {.directory = dir / "out", .mirror = mirror, .quiet = true};
}

// Nothing but the named files is left in the set's folder, which is gone when it would be empty.
std::vector<std::string> left(const TempDir& dir) {
  std::vector<std::string> names;
  if (!std::filesystem::exists(dir / "out/folder")) return names;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(dir / "out/folder"))
    if (entry.is_regular_file()) names.push_back(std::filesystem::relative(entry.path(), dir / "out/folder").string());
  std::sort(names.begin(), names.end());
  return names;
}

uint32_t crc32(const std::string& bytes) {
  uint32_t crc = ~0u;
  for (const char c : bytes) {
    crc ^= static_cast<unsigned char>(c);
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (0xEDB88320u & (0u - (crc & 1)));
  }
  return ~crc;
}

// A ZIP archive of one stored file.
std::string zip_of(const std::string& name, const std::string& bytes) {
  const auto le = [](uint64_t value, int n) {
    std::string out;
    for (int i = 0; i < n; ++i) out.push_back(static_cast<char>(value >> (8 * i) & 0xFF));
    return out;
  };
  const std::string common = le(20, 2) + le(0, 2) + le(0, 2) + le(0, 4) + le(crc32(bytes), 4) + le(bytes.size(), 4) +
                             le(bytes.size(), 4) + le(name.size(), 2) + le(0, 2);
  const std::string local = "PK\x03\x04" + common + name + bytes;
  const std::string central = "PK\x01\x02" + le(20, 2) + common + le(0, 2) + le(0, 2) + le(0, 2) + le(0, 4) + le(0, 4) + name;
  return local + central + "PK\x05\x06" + le(0, 4) + le(1, 2) + le(1, 2) + le(central.size(), 4) + le(local.size(), 4) + le(0, 2);
}

}  // namespace

TEST_CASE("fetch copies from a mirror directory, checks, and does nothing the second time") {
  const TempDir dir;
  std::filesystem::create_directories(dir / "mirror");
  write_file(dir / "mirror/text.txt", kText);
  const auto files = fetch(plain_set(), options(dir, dir / "mirror"));
  REQUIRE(files.size() == 1);
  CHECK(files[0].verified);
  CHECK_FALSE(files[0].was_there);
  CHECK(read_file(files[0].path) == kText);
  std::filesystem::remove_all(dir / "mirror");
  CHECK(fetch(plain_set(), options(dir, dir / "mirror"))[0].was_there);
  CHECK(left(dir) == std::vector<std::string>{"text.txt"});
}

TEST_CASE("fetch from a URL goes on where a download stopped") {
  const TempDir dir;
  std::filesystem::create_directories(dir / "mirror");
  std::filesystem::create_directories(dir / "out/folder");
  write_file(dir / "mirror/text.txt", kText);
  const std::string url = "file://" + dir / "mirror", part = dir / "out/folder/text.txt.part";
  SECTION("from nothing") {}
  SECTION("from the first half") { write_file(part, kText.substr(0, kText.size() / 2)); }
  SECTION("from a complete part") { write_file(part, kText); }
  SECTION("from a part that is too long") { write_file(part, kText + kText); }
  fetch(plain_set(), options(dir, url));
  CHECK(read_file(dir / "out/folder/text.txt") == kText);
  CHECK(left(dir) == std::vector<std::string>{"text.txt"});
}

TEST_CASE("a download continued from something else is found out by its checksum, removed, and whole the next time") {
  const TempDir dir;
  std::filesystem::create_directories(dir / "mirror");
  std::filesystem::create_directories(dir / "out/folder");
  write_file(dir / "mirror/text.txt", kText);
  write_file(dir / "out/folder/text.txt.part", std::string(1000, 'x'));  // kept, so the file was continued
  const std::string url = "file://" + dir / "mirror";
  const std::string message = error_of([&] { fetch(plain_set(), options(dir, url)); });
  INFO(message);
  CHECK(contains(message, "SHA-256 is"));
  CHECK(contains(message, sha256(kText)));
  CHECK(left(dir).empty());
  fetch(plain_set(), options(dir, url));
  CHECK(read_file(dir / "out/folder/text.txt") == kText);
}

TEST_CASE("fetch unpacks gzip, tar and zip archives") {
  const TempDir dir;
  std::filesystem::create_directories(dir / "mirror/inner");
  write_file(dir / "mirror/inner/text.txt", kText);
  FetchSet set = plain_set();
  FetchSource& source = set.sources[0];
  SECTION("gzip") {
    source.file = "text.txt.gz";
    source.pack = FetchSource::Pack::gzip;
    write_file(dir / "mirror/text.txt.gz", run({"gzip", "-c", dir / "mirror/inner/text.txt"}));
  }
  SECTION("tar.gz") {
    source.file = "a.tar.gz";
    source.pack = FetchSource::Pack::tar_gz;
    source.members[0].inside = "inner/text.txt";
    run({"tar", "-czf", dir / "mirror/a.tar.gz", "-C", dir / "mirror", "inner/text.txt"});
  }
  SECTION("zip") {
    source.file = "a.zip";
    source.pack = FetchSource::Pack::zip;
    source.members[0].inside = "inner/text.txt";
    write_file(dir / "mirror/a.zip", zip_of("inner/text.txt", kText));
  }
  source.sha256 = sha256_file(dir / ("mirror/" + source.file));
  for (const std::string& mirror : {dir / "mirror", "file://" + dir / "mirror"}) {
    std::filesystem::remove_all(dir / "out");
    fetch(set, options(dir, mirror));
    CHECK(read_file(dir / "out/folder/text.txt") == kText);
    CHECK(left(dir) == std::vector<std::string>{"text.txt"});
  }
}

TEST_CASE("damage in a mirror changes nothing") {
  const TempDir dir;
  std::filesystem::create_directories(dir / "mirror");
  std::filesystem::create_directories(dir / "out/folder");
  write_file(dir / "mirror/text.txt", kText.substr(1));
  write_file(dir / "out/folder/text.txt", "mine");
  CHECK(contains(error_of([&] { fetch(plain_set(), options(dir, dir / "mirror")); }), "it is damaged or another version"));
  CHECK(read_file(dir / "out/folder/text.txt") == "mine");
  CHECK(left(dir) == std::vector<std::string>{"text.txt"});

  FetchSet set = plain_set();  // an archive that lacks a file
  set.sources[0].file = "a.tar.gz";
  set.sources[0].pack = FetchSource::Pack::tar_gz;
  set.sources[0].members[0].inside = "other.txt";
  run({"tar", "-czf", dir / "mirror/a.tar.gz", "-C", dir / "mirror", "text.txt"});
  set.sources[0].sha256 = sha256_file(dir / "mirror/a.tar.gz");
  CHECK(contains(error_of([&] { fetch(set, options(dir, dir / "mirror")); }), "tar cannot unpack it"));
  CHECK(left(dir) == std::vector<std::string>{"text.txt"});
  CHECK(contains(error_of([&] { fetch(plain_set("b.txt"), options(dir, dir / "mirror")); }), "holds neither b.txt nor b.txt"));
}

TEST_CASE("without a connection or a program fetch says what to do") {
  const TempDir dir;
  FetchSet set = plain_set();
  set.sources[0].urls = {"http://127.0.0.1:9/text.txt"};
  std::string message = error_of([&] { fetch(set, options(dir, "")); });
  INFO(message);
  CHECK(contains(message, "text.txt: could not be downloaded:\n  http://127.0.0.1:9/text.txt: "));
  CHECK(contains(message, "--mirror DIR"));

  const std::string path = std::getenv("PATH");
  ::setenv("PATH", dir.path().c_str(), 1);
  message = error_of([&] { fetch(set, options(dir, "")); });
  ::setenv("PATH", path.c_str(), 1);
  CHECK(contains(message, "needs the program curl or wget"));
}

TEST_CASE("a file without a known checksum is said to be unverified") {
  const TempDir dir;
  std::filesystem::create_directories(dir / "mirror");
  write_file(dir / "mirror/text.txt", kText);
  FetchSet set = plain_set();
  set.sources[0].sha256 = set.sources[0].members[0].sha256 = "";
  const auto files = fetch(set, options(dir, dir / "mirror"));
  CHECK_FALSE(files[0].verified);
  CHECK(contains(to_string(set, files), "no checksum is known; sha256 " + sha256(kText)));
}

TEST_CASE("the public sets can be taken from a local mirror") {
  if (shared_data("mnist").empty()) return;
  const std::string mirror = std::filesystem::path(shared_data("mnist")).parent_path().string();
  const TempDir dir;
  for (const char* name : {"mnist", "shakespeare", "wikitext-2"}) {
    INFO(name);
    const FetchSet set = find_fetch_set(name);
    const auto files = fetch(set, options(dir, mirror));
    CHECK(std::all_of(files.begin(), files.end(), [](const FetchedFile& f) { return f.verified; }));
    CHECK(fetch(set, options(dir, "/nowhere"))[0].was_there);
  }
  CHECK(std::filesystem::exists(dir / "out/mnist/train-images-idx3-ubyte"));
  CHECK(std::filesystem::exists(dir / "out/wikitext-2/wiki.train.tokens"));
  CHECK(contains(error_of([] { find_fetch_set("imagenet"); }), "choose one of mnist, cifar10"));
}

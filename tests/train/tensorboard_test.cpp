#include "train/tensorboard.h"

#include <cstring>

#include "tests/testing/catch.h"
#include "tests/train/temporary_directory.h"
#include "train/crc32c.h"

using namespace krait;
using namespace krait::train;
using krait::testing::TemporaryDirectory;

namespace {

uint32_t masked(std::string_view bytes) {
  const uint32_t crc = crc32c(bytes);
  return ((crc >> 15) | (crc << 17)) + 0xA282EAD8u;
}

/// Takes the file apart by the format's own rules; checks lengths and checksums.
std::vector<std::string> read_records(const std::string& bytes) {
  std::vector<std::string> records;
  size_t at = 0;
  while (at < bytes.size()) {
    uint64_t length = 0;
    uint32_t length_crc = 0, crc = 0;
    REQUIRE(at + 12 <= bytes.size());
    std::memcpy(&length, bytes.data() + at, 8);
    std::memcpy(&length_crc, bytes.data() + at + 8, 4);
    CHECK(length_crc == masked(std::string_view(bytes).substr(at, 8)));
    REQUIRE(at + 16 + length <= bytes.size());
    records.push_back(bytes.substr(at + 12, length));
    std::memcpy(&crc, bytes.data() + at + 12 + length, 4);
    CHECK(crc == masked(records.back()));
    at += 16 + length;
  }
  return records;
}

}  // namespace

TEST_CASE("crc32c: published check values, whole and in pieces") {
  CHECK(crc32c("123456789") == 0xE3069283u);  // RFC 3720, and every CRC catalogue
  CHECK(crc32c(std::string(32, '\0')) == 0x8A9136AAu);
  CHECK(crc32c(std::string(32, '\xFF')) == 0x62A8AB43u);
  CHECK(crc32c("") == 0);
  const std::string text = "the quick brown fox jumps over the lazy dog";
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    CHECK(crc32c(text.substr(cut), crc32c(text.substr(0, cut))) == crc32c(text));
  }
}

TEST_CASE("tensorboard: frames and messages are what the format says") {
  const TemporaryDirectory tmp;
  TensorBoardWriter writer(tmp / "tb");
  writer.write(300, {{"train/loss", 1.5}, {"lr", 0.25}});
  const std::vector<std::string> records = read_records(read_file(writer.path()));
  REQUIRE(records.size() == 2);
  // Event: wall_time (field 1, 8 bytes), step (field 2, varint), then the payload.
  CHECK(records[0].substr(0, 1) == "\x09");
  CHECK(records[0].substr(9) == std::string("\x10\x00\x1a\x0d", 4) + "brain.Event:2");
  const std::string loss = std::string("\x0a\x11\x0a\x0atrain/loss", 14) + std::string("\x15\x00\x00\xc0\x3f", 5);
  const std::string lr = std::string("\x0a\x09\x0a\x02lr", 6) + std::string("\x15\x00\x00\x80\x3e", 5);
  CHECK(records[1].substr(9) == std::string("\x10\xac\x02\x2a", 4) + static_cast<char>(loss.size() + lr.size()) + loss + lr);
}

TEST_CASE("tensorboard: a resumed run starts a new file that takes back later steps") {
  const TemporaryDirectory tmp;
  const TensorBoardWriter first(tmp / "tb");
  const TensorBoardWriter second(tmp / "tb", 20);
  CHECK(first.path() != second.path());
  const auto records = read_records(read_file(second.path()));
  REQUIRE(records.size() == 2);
  CHECK(records[1].substr(9) == std::string("\x10\x15\x3a\x02\x08\x01", 6));  // step 21, session_log {status: START}
}

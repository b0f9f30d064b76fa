#include "train/tensorboard.h"

#include <unistd.h>

#include <bit>
#include <chrono>
#include <filesystem>

#include "train/crc32c.h"

namespace krait::train {
namespace {

// The protobuf wire format: varints, and fields as (number << 3 | type).
std::string varint(uint64_t value) {
  std::string out;
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  return out + static_cast<char>(value);
}

template <class T>
std::string little_endian(T value) {
  std::string out;
  for (size_t i = 0; i < sizeof value; ++i) out += static_cast<char>(value >> (8 * i));
  return out;
}

std::string tag(uint64_t field, uint64_t type) { return varint(field << 3 | type); }
std::string integer_field(uint64_t field, int64_t value) { return tag(field, 0) + varint(static_cast<uint64_t>(value)); }
std::string double_field(uint64_t field, double value) {
  return tag(field, 1) + little_endian(std::bit_cast<uint64_t>(value));
}
std::string bytes_field(uint64_t field, std::string_view value) {
  return tag(field, 2) + varint(value.size()) + std::string(value);
}
std::string float_field(uint64_t field, float value) {
  return tag(field, 5) + little_endian(std::bit_cast<uint32_t>(value));
}

double now() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

uint32_t masked_crc(std::string_view bytes) {
  const uint32_t crc = crc32c(bytes);
  return ((crc >> 15) | (crc << 17)) + 0xA282EAD8u;
}

}  // namespace

std::string tfrecord_frame(std::string_view message) {
  const std::string length = little_endian(uint64_t{message.size()});
  return length + little_endian(masked_crc(length)) + std::string(message) + little_endian(masked_crc(message));
}

TensorBoardWriter::TensorBoardWriter(const std::string& directory, int64_t resumed_after) {
  std::filesystem::create_directories(directory);
  char host[256] = "localhost";
  if (::gethostname(host, sizeof host - 1) < 0) host[0] = '\0';
  // TensorBoard reads files in the order of their names; the time comes first.
  const auto stem = fmt::format("{}/events.out.tfevents.{:010d}.{}.{}", directory, static_cast<int64_t>(now()), host, ::getpid());
  path_ = stem;
  for (int i = 1; std::filesystem::exists(path_); ++i) path_ = fmt::format("{}.{}", stem, i);
  file_ = AppendFile(path_);
  event(0, bytes_field(3, "brain.Event:2"));
  constexpr int64_t kStart = 1;  // SessionLog.status
  if (resumed_after >= 0) event(resumed_after + 1, bytes_field(7, integer_field(1, kStart)));
}

void TensorBoardWriter::event(int64_t step, const std::string& fields) {
  file_.append(tfrecord_frame(double_field(1, now()) + integer_field(2, step) + fields));
}

void TensorBoardWriter::write(int64_t step, const std::vector<std::pair<std::string, double>>& scalars) {
  std::string summary;
  for (const auto& [name, value] : scalars) {
    summary += bytes_field(1, bytes_field(1, name) + float_field(2, static_cast<float>(value)));
  }
  event(step, bytes_field(5, summary));
}

}  // namespace krait::train

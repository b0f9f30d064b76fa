#include "train/crc32c.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <memory>

#include "train/files.h"

namespace krait::train {
namespace {

constexpr auto kTable = [] {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int bit = 0; bit < 8; ++bit) c = (c >> 1) ^ (c & 1 ? 0x82F63B78u : 0u);
    table[i] = c;
  }
  return table;
}();

}  // namespace

uint32_t crc32c(std::string_view bytes, uint32_t crc) {
  const char* p = bytes.data();
  size_t n = bytes.size();
  crc = ~crc;
#ifdef __SSE4_2__
  // The processor's instruction: about 8 bytes in 3 cycles, faster than any disk.
  uint64_t wide = crc;
  for (; n >= 8; p += 8, n -= 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    wide = __builtin_ia32_crc32di(wide, word);
  }
  crc = static_cast<uint32_t>(wide);
#endif
  for (; n > 0; ++p, --n) crc = (crc >> 8) ^ kTable[(crc ^ static_cast<unsigned char>(*p)) & 0xFFu];
  return ~crc;
}

uint32_t crc32c_file(const std::string& path, int64_t* size) {
  constexpr size_t kPiece = 1 << 20;
  const auto buffer = std::make_unique<char[]>(kPiece);
  const FileDescriptor file = FileDescriptor::open(path, O_RDONLY);
  uint32_t crc = 0;
  while (true) {
    const ssize_t count = ::read(file.get(), buffer.get(), kPiece);
    if (count < 0 && errno == EINTR) continue;
    check_posix(count, path + ": cannot be read");
    if (count == 0) return crc;
    crc = crc32c({buffer.get(), static_cast<size_t>(count)}, crc);
    if (size) *size += count;
  }
}

}  // namespace krait::train

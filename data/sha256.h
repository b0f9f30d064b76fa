#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace krait::data {

/// SHA-256 (FIPS 180-4) of bytes that arrive in pieces.
class Sha256 {
 public:
  void update(std::string_view bytes);
  /// 64 hexadecimal digits, as sha256sum prints them. Further updates are not allowed.
  std::string hex();

 private:
  void block(const unsigned char* bytes);
  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<unsigned char, 64> pending_{};
  uint64_t size_ = 0;
};

std::string sha256(std::string_view bytes);
/// Of a file, read in pieces. Throws when it cannot be read.
std::string sha256_file(const std::string& path);

}  // namespace krait::data

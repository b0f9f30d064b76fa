#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace krait::train {

/// CRC-32C (Castagnoli, RFC 3720): TensorBoard frames and checkpoint files. `crc` continues an earlier result.
uint32_t crc32c(std::string_view bytes, uint32_t crc = 0);
/// Of a file, read in pieces; adds its size to *size.
uint32_t crc32c_file(const std::string& path, int64_t* size = nullptr);

}  // namespace krait::train
